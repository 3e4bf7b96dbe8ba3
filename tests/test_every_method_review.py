"""Cases in which curvature once was silently wrong: owners of a shared A that freeze, ignored targets."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from tests.training import Batch, distance, run_step, snapshot, twin


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
    """And unfreezing it gives the newer average back."""
    model = TwoReaders().double()
    method = {"kfac": kfac_fx.KFAC, "ekfac": kfac_fx.EKFAC, "foof": kfac_fx.FOOF, "nkfac": kfac_fx.NKFAC}[
        name
    ]
    step = kfac_fx.compile(
        model,
        F.cross_entropy,
        method=method(statistics_every=1, inverse_every=2, decay=0.9),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        backend="eager",
    )
    batch: Batch = (torch.randn(8, 6).double(), torch.arange(8) % 4)
    run_step(step, [batch] * 6)
    before = {n: t.clone() for n, t in step.state_dict()["curvature"]["k.weight"].items()}
    for frozen in (True, False):
        model.q.requires_grad_(not frozen)
        run_step(step, [batch] * 2)
        after = step.state_dict()["curvature"]["k.weight"]
        scale = (1 - 0.9 ** (8 if frozen else 10)) / (1 - 0.9**6) if name == "nkfac" else 1.0
        assert (after["A"] - scale * before["A"]).norm() < 1e-10 * before["A"].norm()


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
