"""The diagonal method: the exact diagonal of the Fisher against autograd, for every structure."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx import report
from kfac_fx.methods import METHODS
from tests.helpers import gradients, one_step
from tests.oracles import parameters_ggn, relative_error

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

TOLERANCE = 1e-10
DAMPING = 0.02


class Everything(nn.Module):
    """A tied table, a norm, tokens that share a weight, two uses of one layer and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.layer = (
            nn.Embedding(5, 4, padding_idx=4),
            nn.LayerNorm(4),
            nn.Linear(4, 4),
        )
        self.gate = nn.Parameter(torch.randn(4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.words(tokens))
        x = self.layer(torch.tanh(self.layer(x))) * self.gate
        return (x @ self.words.weight.T).mean(1)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 2, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(36, 3)
    )


def example(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    if kind == "convolutions":
        x = torch.randn(6, 2, 3, 3, dtype=torch.float64)
        return convolutions().double(), x, torch.randint(3, (6,))
    return Everything().double(), torch.randint(5, (6, 3)), torch.randint(5, (6,))


def diagonal(**settings: float | None) -> kfac_fx.Diagonal:
    return kfac_fx.Diagonal(**{"damping": DAMPING, "kl_clip": None, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["convolutions", "everything"])
def test_the_step_divides_by_the_exact_diagonal_whatever_the_sharing(kind: str, sharing: str) -> None:
    model, x, y = example(kind)
    result = one_step(model, F.cross_entropy, x, y, method=diagonal(), fisher="type2", sharing=sharing)
    names, grads = list(dict(model.named_parameters())), gradients(model, F.cross_entropy, x, y)
    exact = parameters_ggn(model, nn.CrossEntropyLoss(), x, y, names).diagonal()
    pieces = exact.split([model.get_parameter(name).numel() for name in names])
    plan = kfac_fx.inspect(model, F.cross_entropy, x, y, method="diagonal")
    assert not plan.skipped
    for name, piece in zip(names, pieces, strict=True):
        if name == "words.weight":  # the padding word has curvature as an output alone
            assert piece.view(5, 4)[4].sum() > 0
        wanted = grads[name] / (piece.view_as(grads[name]) + DAMPING)
        assert relative_error(-result.change[name], wanted) < TOLERANCE


def test_it_is_averaged_with_bias_correction() -> None:
    model, x, y = example("convolutions")
    method, states = diagonal(decay=0.5), []
    for batches in ([x], [x.flip(0) + 1], [x, x.flip(0) + 1]):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step = kfac_fx.compile(model, F.cross_entropy, method=method, optimizer=optimizer, backend="eager")
        for batch in batches:
            step(batch, y)
        states.append(step.state_dict()["curvature"]["0.weight"]["S"])
    assert relative_error(states[2], (0.5 * states[0] + states[1]) / 1.5) < TOLERANCE
    assert relative_error(states[0], states[1]) > 1e-1


def test_without_damping_entries_without_curvature_are_left_alone() -> None:
    model, x, y = example("everything")
    x = x.clamp(max=2)
    model = nn.Sequential(model.words, nn.Flatten(), nn.Linear(12, 5).double())
    change = one_step(model, F.cross_entropy, x, y, method=diagonal(damping=0.0), fisher="type2").change
    assert torch.equal(change["0.weight"][3:], torch.zeros(2, 4, dtype=torch.float64))
    assert change["0.weight"][0].norm() > 0 and all(torch.isfinite(c).all() for c in change.values())


def test_the_kl_clip_bounds_the_step() -> None:
    model, x, y = example("convolutions")
    grads = gradients(model, F.cross_entropy, x, y)
    clipped, free = (
        one_step(
            model, F.cross_entropy, x, y, method=diagonal(kl_clip=clip), fisher="empirical", lr=0.5
        ).change
        for clip in (1e-3, None)
    )
    product = float(sum((-change / 0.5 * grads[name]).sum() for name, change in free.items()))
    nu = (1e-3 / (0.25 * product)) ** 0.5
    assert 0 < nu < 0.9
    assert all(relative_error(change, nu * free[name]) < TOLERANCE for name, change in clipped.items())


def test_nothing_is_refreshed_and_the_report_says_so() -> None:
    model, x, y = example("convolutions")
    with pytest.raises(ValueError, match=r"Diagonal\(inverse_every=5\): must be 0"):
        kfac_fx.Diagonal(inverse_every=5)
    with pytest.raises(ValueError, match=r"KFAC\(inverse_every=0\)"):
        kfac_fx.KFAC(inverse_every=0)
    plan = kfac_fx.inspect(model, F.cross_entropy, x, y, method="diagonal")
    assert "refresh never" in str(plan)
    assert report.document(plan)["totals"]["overhead"]["inversion"] == 0
    assert sum(f.bytes for f in plan.factors) == 4 * 2 * sum(p.numel() for p in model.parameters())


class Routed(nn.Module):
    """Ten of twelve tokens, each sent to one of three experts: no whole number of rows per example."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 6) / 2)
        self.register_buffer("chosen", torch.tensor([0, 1, 2, 0, 2, 1, 0, 1, 2, 2]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(self.weight[self.chosen], x.flatten(0, 1)[:10].unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["diagonal", "ekfac"])
def test_rows_of_experts_that_are_no_whole_examples_are_squared_one_by_one(name: str, sharing: str) -> None:
    torch.manual_seed(0)
    model, x, y = Routed().double(), torch.randn(4, 3, 6, dtype=torch.float64), torch.randint(5, (10,))
    settings = {"scale_decay": 0.0, "inverse_every": 10} if name == "ekfac" else {}
    step = kfac_fx.compile(
        model,
        F.cross_entropy,
        method=METHODS[name](statistics_every=1, **settings),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        fisher="type2",
        sharing=sharing,  # type: ignore[arg-type]
        backend="eager",
    )
    step(x, y)
    step(x, y)  # the first that EKFAC squares in the basis of its factors
    state = step.state_dict()["curvature"]["weight"]
    exact = parameters_ggn(model, nn.CrossEntropyLoss(), x, y, ["weight"])
    for expert, squares in enumerate(state["S"]):
        own = slice(30 * expert, 30 * expert + 30)
        q_g, q_a = (
            state[f"{side}_basis"][expert] if name == "ekfac" else torch.eye(size, dtype=torch.float64)
            for side, size in (("G", 5), ("A", 6))
        )
        basis = torch.kron(q_g, q_a)
        assert relative_error(squares.flatten(), (basis.T @ exact[own, own] @ basis).diagonal()) < TOLERANCE
