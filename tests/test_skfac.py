"""SKFAC's directions against dense K-FAC and against formulas written here, for every strategy."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from tests.oracles import append_one, conv_patches, relative_error
from tests.training import twin

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
    other, _ = run(model, kfac(damping_rule=rule), [batch])
    assert differs(found, other, "0.weight"), "expand is another curvature"


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
    settings = {"decay": 0.6, "inverse_every": 3}
    found, step = run(model, skfac(window=3, **settings), batches, lr=0.1)
    assert_equal(found, run(model, kfac(**settings), batches, lr=0.1)[0])
    assert step.state_dict()["curvature"]["0.weight"]["A_rows"].shape == (1, 15, 61)
    newest, _ = run(model, skfac(window=1, **settings), batches, lr=0.1)
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


class Sampled(nn.Module):
    """A convolution with 36 positions whose rows can be told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 20, 3, padding=1), nn.Linear(720, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(1))


def drawn_in(state: dict[str, Tensor], model: Sampled, x: Tensor, count: int) -> list[int]:
    """The positions whose patches are the rows of A, the same for every example."""
    patches = append_one(conv_patches(model.conv, x).flatten(2))
    rows = state["A_rows"][0].unflatten(0, (len(x), count)) * (len(x) * count) ** 0.5
    distance = (rows.unsqueeze(2) - patches.unsqueeze(1)).abs().amax(-1)
    assert distance.amin(2).max() < 1e-12
    chosen = distance.argmin(2)
    assert (chosen == chosen[0]).all()
    return chosen[0].tolist()


def test_subsampled_positions_are_those_of_a_and_of_g_and_change_with_every_update() -> None:
    model, x, y = Sampled().double(), doubles(2, 3, 6, 6), torch.randint(4, (2,))
    histories = []
    for seed in (1, 1, 2):
        method, history = skfac(strategy="subsample", positions=3, seed=seed), []
        copy = twin(model)
        optimizer = torch.optim.SGD(copy.parameters(), lr=0.0)
        step = kfac_fx.compile(copy, F.cross_entropy, method=method, optimizer=optimizer, backend="eager")
        for _ in range(4):
            step(x, y)
            state = step.state_dict()["curvature"]["conv.weight"]
            history.append(drawn_in(state, copy, x, 3))
            out = copy.conv(x)
            (g,) = torch.autograd.grad(F.cross_entropy(copy.head(out.flatten(1)), y), out)
            rows = g.flatten(2)[:, :, history[-1]].transpose(1, 2).flatten(0, 1) * (2 * 36 / 3) ** 0.5
            assert relative_error(state["G_rows"][0], rows) < TOLERANCE
        histories.append(history)
    assert histories[0] == histories[1] != histories[2]
    assert len({tuple(h) for h in histories[0]}) == 4


def test_a_convolution_with_few_positions_keeps_them_all() -> None:
    model, batch = conv_net(), images(3)
    found, _ = run(model, skfac(strategy="subsample", positions=16), [batch])
    assert_equal(found, run(model, kfac(), [batch])[0])


def by_field(module: nn.Conv2d, x: Tensor, g: Tensor, *, sharing: str, num_terms: int) -> Tensor:
    """V of strategy S3 with dense algebra: A of summed patches, its trace matched; the bias by itself."""
    patches = conv_patches(module, x)  # [N, T, C, K]
    gradient = torch.einsum("nto,ntck->ock", g, patches)
    if sharing == "reduce":
        patches, g = patches.mean(1, keepdim=True), g.sum(1, keepdim=True)
    num, volume = patches.shape[0] * patches.shape[1], patches.shape[3]
    trace = (patches**2).sum() / num
    fields = patches.sum(3).flatten(0, 1)
    a = fields.T @ fields / num
    a = a * trace / (volume * a.trace())
    factor = num_terms * torch.einsum("nto,ntp->op", g, g)
    pi = math.sqrt((a.trace() / len(a)) / (factor.trace() / len(factor)))
    gamma_a, gamma_g = pi * math.sqrt(DAMPING), math.sqrt(DAMPING) / pi
    inverse_a = torch.linalg.inv(a + gamma_a * torch.eye(len(a), dtype=a.dtype))
    inverse_g = torch.linalg.inv(factor + gamma_g * torch.eye(len(factor), dtype=a.dtype))
    weights = torch.einsum("op,pck,cd->odk", inverse_g, gradient, inverse_a)
    bias = inverse_g @ g.sum((0, 1)) / (1 + gamma_a)
    return torch.cat([weights.flatten(1), bias[:, None]], 1)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("channels", [3, 40])
def test_receptive_field_sums_precondition_the_channels(channels: int, sharing: str) -> None:
    conv = nn.Conv2d(channels, 5, 3, stride=2, padding=1)
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(20, 4)).double()
    x, y = doubles(4, channels, 4, 4), torch.randint(4, (4,))
    found, step = run(model, skfac(strategy="receptive_field"), [(x, y)], sharing=sharing)
    out = conv(x)
    (g,) = torch.autograd.grad(F.cross_entropy(model[2](out.flatten(1)), y), out)
    expected = by_field(conv, x, g.flatten(2).mT, sharing=sharing, num_terms=4)
    assert relative_error(found["0.weight"].flatten(1), expected[:, :-1].detach()) < TOLERANCE
    assert relative_error(found["0.bias"], expected[:, -1].detach()) < TOLERANCE
    state = step.state_dict()["curvature"]["0.weight"]
    assert ("A_z" in state) == (channels == 40)
    assert max(t.shape[-1] for n, t in state.items() if n.startswith("A") and t.dim() > 1) == channels


def test_receptive_fields_of_one_pixel_are_ordinary_convolutions() -> None:
    model, batch = nn.Sequential(nn.Conv2d(2, 9, 1), nn.Flatten(), nn.Linear(441, 4)).double(), images(3)
    found, _ = run(model, skfac(strategy="receptive_field"), [batch])
    assert_equal(found, run(model, kfac(), [batch])[0])


def test_grouped_receptive_fields_are_the_single_groups_side_by_side() -> None:
    whole = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(54, 4)).double()
    x, y = doubles(5, 4, 5, 5), torch.randint(4, (5,))
    found, _ = run(whole, skfac(strategy="receptive_field", damping_rule="sqrt"), [(x, y)])

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = (nn.Conv2d(2, 3, 3).double() for _ in range(2))
            self.head = twin(whole[2])
            for i, half in enumerate((self.left, self.right)):
                half.weight.data = whole[0].weight.data[3 * i : 3 * i + 3].clone()
                half.bias.data = whole[0].bias.data[3 * i : 3 * i + 3].clone()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.left(x[:, :2]), self.right(x[:, 2:])], 1).flatten(1))

    apart, _ = run(Halves(), skfac(strategy="receptive_field", damping_rule="sqrt"), [(x, y)])
    joined = torch.cat([apart["left.weight"], apart["right.weight"]])
    assert relative_error(found["0.weight"], joined) < TOLERANCE


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
