"""SKFAC's directions against dense K-FAC and against formulas written here."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from tests.oracles import append_one, relative_error
from tests.training import twin

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

TOLERANCE = 1e-10
DAMPING = 0.05


def doubles(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64)


def conv_net() -> nn.Module:
    """Plain, grouped and depthwise convolutions; side lengths from 1 to 73."""
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, stride=2),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False),
        nn.Conv2d(8, 12, 3, groups=2),
        nn.Tanh(),
        nn.Conv2d(12, 10, 1),
        nn.Flatten(),
        nn.Linear(40, 4),
    ).double()


class Tokens(nn.Module):
    """An embedding, then q, k and v that read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 24), nn.Linear(24, 3)
        self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return self.head(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)).mean(1))


def skfac(**settings: Any) -> kfac_fx.SKFAC:
    return kfac_fx.SKFAC(**{"damping": DAMPING, "statistics_every": 1, "inverse_every": 1} | settings)


def kfac(**settings: Any) -> kfac_fx.KFAC:
    """Dense, of the newest batch alone."""
    return kfac_fx.KFAC(**{"damping": DAMPING, "kl_clip": None, "inverse_every": 1, "decay": 0.0} | settings)


def run(
    model: nn.Module, method: Any, batches: list[tuple[Tensor, Tensor]], *, lr: float = 1.0, **options: Any
) -> tuple[dict[str, Tensor], kfac_fx.TrainStep]:
    """(change of every parameter, step) after these batches on a copy of the model, by plain SGD."""
    copy = twin(model)
    optimizer = torch.optim.SGD(copy.parameters(), lr=lr)
    options = {"backend": "eager", "optimizer": optimizer} | options
    step = kfac_fx.compile(copy, options.pop("loss", F.cross_entropy), method=method, **options)
    for x, y in batches:
        step(x, y)
    named = dict(model.named_parameters())
    return {name: (named[name] - p).detach() for name, p in copy.named_parameters()}, step


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert {n: relative_error(v, expected[n]) for n, v in found.items()} == pytest.approx(
        dict.fromkeys(expected, 0.0), abs=TOLERANCE
    )


def differs(found: dict[str, Tensor], expected: dict[str, Tensor], name: str) -> bool:
    return relative_error(found[name], expected[name]) > 1e-2


def images(size: int) -> tuple[Tensor, Tensor]:
    return doubles(size, 2, 7, 7), torch.randint(4, (size,))


@pytest.mark.parametrize("rule", ["factored", "sqrt", "full"])
@pytest.mark.parametrize("size", [3, 25, 60], ids=["thin", "mixed", "dense"])
def test_w7_reduce_is_kfac_reduce_at_the_same_damping(size: int, rule: str) -> None:
    model, batch = conv_net(), images(size)
    found, step = run(model, skfac(damping_rule=rule), [batch])
    expected, _ = run(model, kfac(damping_rule=rule), [batch], sharing="reduce")
    assert_equal(found, expected)
    forms = {name for state in step.state_dict()["curvature"].values() for name in state}
    assert {"A_rows" in forms, "A_z" in forms} == ({True} if size == 3 else {size == 25, False})


def test_reduce_is_not_kfac_expand() -> None:
    model, batch = conv_net(), images(3)
    found, _ = run(model, skfac(), [batch])
    other, _ = run(model, kfac(), [batch])
    assert differs(found, other, "0.weight")


@pytest.mark.parametrize("size", [3, 30], ids=["thin", "dense"])
def test_w7_the_papers_scale_is_reduce_with_g_over_the_squared_number_of_positions(size: int) -> None:
    """Of a convolution with 16 positions alone; the linear layer is as it was."""
    model, batch = nn.Sequential(nn.Conv2d(2, 5, 3, stride=2, padding=1), nn.Flatten()), images(size)
    model = model.append(nn.Linear(80, 4)).double()
    exact, _ = run(model, skfac(damping_rule="sqrt"), [batch])
    paper, _ = run(model, skfac(damping_rule="sqrt", scale="paper"), [batch])
    assert torch.equal(exact["2.weight"], paper["2.weight"])
    factors = run(model, kfac(), [batch], sharing="reduce")[1].state_dict()["curvature"]["0.weight"]
    x, y = batch
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), [model[0].weight, model[0].bias])
    whole = torch.cat([grads[0].flatten(1), grads[1][:, None]], 1)
    for found, scale in ((exact, 1.0), (paper, 16.0**2)):
        a, g = factors["A"][0], factors["G"][0] / scale
        eye_a, eye_g = (math.sqrt(DAMPING) * torch.eye(len(m), dtype=a.dtype) for m in (a, g))
        expected = torch.linalg.solve(g + eye_g, whole) @ torch.linalg.inv(a + eye_a)
        assert relative_error(found["0.weight"].flatten(1), expected[:, :-1]) < TOLERANCE
        assert relative_error(found["0.bias"], expected[:, -1]) < TOLERANCE


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("size", [2, 6], ids=["thin", "dense"])
def test_linear_and_embedding_layers_follow_the_sharing_mode(size: int, sharing: str) -> None:
    model, batch = Tokens().double(), (torch.randint(9, (size, 5)), torch.randint(3, (size,)))
    found, step = run(model, skfac(), [batch], sharing=sharing)
    assert_equal(found, run(model, kfac(), [batch], sharing=sharing)[0])
    columns = {f.columns for f in step.plan.factors if f.owner == "q.weight"}
    rows = size * 5 if sharing == "expand" else size
    assert columns == {None if rows > 24 else rows}


@pytest.mark.parametrize("fisher", ["empirical", "type2"])
def test_the_passes_of_the_fisher_are_further_columns_of_g(fisher: str) -> None:
    model, x = nn.Sequential(nn.Linear(9, 20), nn.Tanh(), nn.Linear(20, 3)).double(), doubles(2, 9)
    batch = x, torch.randint(3, (2,))
    found, step = run(model, skfac(), [batch], fisher=fisher)
    assert_equal(found, run(model, kfac(), [batch], fisher=fisher)[0])
    passes = 3 if fisher == "type2" else 1
    assert {f.side: f.columns for f in step.plan.factors if f.owner == "0.weight"} == {
        "A": 2,
        "G": 2 * passes,
    }


def test_the_average_over_a_window_is_the_moving_average_while_it_holds_all_batches() -> None:
    model = nn.Sequential(nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, 40, bias=False)).double()
    batches = [(doubles(size, 60), torch.randint(40, (size,))) for size in (3, 5, 2)]
    settings = {"decay": 0.6}
    found, step = run(model, skfac(window=3, **settings), batches, lr=0.1)
    assert_equal(found, run(model, kfac(**settings), batches, lr=0.1)[0])
    assert step.state_dict()["curvature"]["0.weight"]["A_rows"].shape == (1, 15, 61)
    newest, _ = run(model, skfac(window=1), batches, lr=0.1)
    assert differs(newest, found, "0.weight")


def test_y5_one_step_of_a_full_rank_refresh_solves_linear_regression() -> None:
    x, y = doubles(30, 6), doubles(30, 1)
    model = nn.Linear(6, 1).double()
    method = skfac(damping=1e-24)
    _, step = run(model, method, [(x, y)], lr=1.0, loss=F.mse_loss, fisher="type2")
    solution = torch.linalg.lstsq(append_one(x), y).solution
    fitted = torch.cat([step.model.weight[0], step.model.bias]).detach()
    assert relative_error(fitted, solution[:, 0]) < 1e-8


def test_w10_a_later_gradient_outside_the_rows_is_divided_by_both_dampings() -> None:
    """The refresh has inputs and output gradients in the first coordinates, the next batch in the others."""
    model = nn.Linear(30, 20, bias=False).double()
    method = skfac(damping_rule="sqrt", statistics_every=9, inverse_every=9)
    step = kfac_fx.compile(
        model,
        lambda out, y: ((out - y) ** 2).sum(1).mean(),
        method=method,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
        backend="eager",
    )
    for part in (0, 1):
        x = torch.zeros(4, 30, dtype=torch.float64)
        x[:, 10 * part : 10 * part + 10] = doubles(4, 10)
        away = torch.zeros(4, 20, dtype=torch.float64)
        away[:, 6 * part : 6 * part + 6] = doubles(4, 6)
        before, y = model.weight.detach().clone(), model(x).detach() + away
        step(x, y)
    gradient = -2 * away.T @ x / 4
    assert relative_error((before - model.weight.detach()) / 1e-3, gradient / DAMPING) < 1e-12


def test_the_kl_clip_is_an_option() -> None:
    model, batch = conv_net(), images(3)
    free, _ = run(model, skfac(), [batch])
    bound, _ = run(model, skfac(kl_clip=1e-4), [batch])
    x, y = batch
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(named.values()))
    product = sum(float((free[n] * g).sum()) for n, g in zip(named, grads, strict=True))
    nu = math.sqrt(1e-4 / product)
    assert nu < 1
    assert_equal(bound, {name: nu * v for name, v in free.items()})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("damping", 0.0),
        ("damping_rule", "tikhonov"),
        ("strategy", "mean"),
        ("scale", "sum"),
        ("positions", 0),
        ("window", 0),
        ("kl_clip", 0.0),
    ],
)
def test_settings_without_meaning_are_refused_by_name(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"SKFAC\({setting}={value!r}\): must be"):
        kfac_fx.SKFAC(**{setting: value})


@pytest.mark.parametrize(
    ("setting", "value", "other"),
    [
        ("scale", "paper", {"strategy": "subsample"}),
        ("positions", 3, {"strategy": "reduce"}),
        ("seed", 1, {"strategy": "receptive_field"}),
        ("decay", 0.5, {"window": 1}),
    ],
)
def test_settings_without_effect_are_refused_by_name(setting: str, value: Any, other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"SKFAC\({setting}={value!r}\): has no effect with"):
        kfac_fx.SKFAC(**{setting: value}, **other)
    kfac_fx.SKFAC(**{setting: getattr(kfac_fx.SKFAC, setting)}, **other)
