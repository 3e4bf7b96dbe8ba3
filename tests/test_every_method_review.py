"""Cases in which curvature once was silently wrong: owners of a shared A that freeze, ignored targets."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx.methods import METHODS
from tests.training import Batch, distance, run_step, snapshot, twin

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")


class TwoReaders(nn.Module):
    """Two layers that read the input; the first of them owns A."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.q(x)) + torch.tanh(self.k(x)))


class Tokens(nn.Module):
    """A label for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mix, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.tokens(tokens)))).transpose(1, 2)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "foof", "nkfac"])
def test_freezing_the_owner_of_a_shared_a_leaves_its_average_to_the_other_readers(name: str) -> None:
    """Theirs is that of a step whose layers never freeze; unfreezing it gives the newer average back."""
    model = TwoReaders().double()
    never = twin(model)
    method = replace(METHODS[name](), statistics_every=1, inverse_every=2, decay=0.9)
    step, reference = (
        kfac_fx.compile(
            trained,
            F.cross_entropy,
            method=method,
            optimizer=torch.optim.SGD(trained.parameters(), lr=0.0),
            backend="eager",
        )
        for trained in (model, never)
    )
    batches: list[Batch] = [(torch.randn(8, 6).double(), torch.arange(8) % 4) for _ in range(9)]
    run_step(step, batches[:6])
    model.q.requires_grad_(False)
    run_step(step, batches[6:8])
    run_step(reference, batches[:8])
    found, expected = (s.state_dict()["curvature"]["k.weight"]["A"].clone() for s in (step, reference))
    assert (found - expected).norm() < 1e-10 * expected.norm()

    model.q.requires_grad_(True)
    run_step(step, batches[8:])
    rows = torch.cat([batches[8][0], torch.ones(8, 1).double()], 1)
    moment, share = rows.T @ rows / 8, 0.1 / (1 - 0.9**7)  # the seventh batch of the owner
    if name == "nkfac":
        moment, share = moment / moment.norm(), 0.1
    after = step.state_dict()["curvature"]["k.weight"]["A"]
    assert (after - found - share * (moment - found)).norm() < 1e-10 * found.norm()


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_parts_equal_the_whole_batch_when_targets_are_ignored(sharing: str) -> None:
    model = Tokens().double()
    tokens, targets = torch.randint(11, (6, 4)), torch.randint(5, (6, 4))
    targets[0, 1:] = targets[3, 2:] = -100
    found = []
    for parts in ([slice(0, 1), slice(1, 6)], [slice(0, 6)]):
        trained = twin(model)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.05)
        method = kfac_fx.KFAC(inverse_every=1)
        step = kfac_fx.compile(
            trained, F.cross_entropy, method=method, optimizer=optimizer, sharing=sharing, backend="eager"
        )
        for part in parts:
            step.accumulate(tokens[part], targets[part])
        step.update()
        found.append(snapshot(trained, step))
    assert distance(*found) < 1e-10
