"""What SKFAC keeps: the form of each side, its bytes, states that grow, accumulation, sharing, failures."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx.errors import Reason
from tests.oracles import relative_error
from tests.test_skfac import DAMPING, assert_equal, conv_net, doubles, images, kfac, run, skfac
from tests.training import differing, run_step, snapshot, twin

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

Batch = tuple[Tensor, Tensor]


def wide_net() -> nn.Module:
    """Side lengths 51, 40 and 41, 30."""
    return nn.Sequential(nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 30)).double()


def vectors(size: int) -> Batch:
    return doubles(size, 50), torch.randint(30, (size,))


def compiled(model: nn.Module, method: Any, *, lr: float = 0.1, **options: Any) -> kfac_fx.TrainStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    options = {"backend": "eager", "optimizer": optimizer} | options
    return kfac_fx.compile(model, F.cross_entropy, method=method, **options)


@pytest.mark.parametrize(
    ("size", "window", "form_a", "form_g"),
    [
        (25, 1, {"A_rows", "A_weights", "A_z", "A_gamma"}, {"G_rows", "G_weights", "G_inverse"}),
        (26, 1, {"A_rows", "A_weights", "A_inverse"}, {"G_rows", "G_weights", "G_inverse"}),
        (40, 1, {"A_rows", "A_weights", "A_inverse"}, {"G", "G_inverse"}),
        (51, 1, {"A", "A_inverse"}, {"G", "G_inverse"}),
        (6, 3, {"A_rows", "A_weights", "A_z", "A_gamma"}, {"G_rows", "G_weights", "G_z", "G_gamma"}),
        (14, 3, {"A_rows", "A_weights", "A_inverse"}, {"G", "G_inverse"}),
    ],
)
def test_the_form_of_a_side_follows_its_columns(
    size: int, window: int, form_a: set[str], form_g: set[str]
) -> None:
    """m < d/2 implicit, m < d materialised, else dense; here d = 51 and 40, m = window * size."""
    model = wide_net()
    _, step = run(model, skfac(window=window), [vectors(size)])
    state = step.state_dict()["curvature"]["0.weight"]
    assert set(state) == form_a | form_g
    m = window * size
    for name, tensor in state.items():
        d = 51 if name.startswith("A") else 40
        if name.endswith(("_rows", "_z")):
            assert tensor.shape == (1, m, d)
        if 2 * m < d:
            assert tensor.numel() <= m * d, "nothing of d x d is kept"


@pytest.mark.parametrize("strategy", ["reduce", "subsample", "receptive_field"])
@pytest.mark.parametrize("size", [2, 20])
def test_the_plans_bytes_and_columns_are_those_of_the_state(size: int, strategy: str) -> None:
    _, step = run(conv_net(), skfac(strategy=strategy, window=2), [images(size)])
    curvature = step.state_dict()["curvature"]
    held = {id(t): t.numel() * t.itemsize for state in curvature.values() for t in state.values()}
    assert sum(f.bytes for f in step.plan.factors) == sum(held.values())
    for factor in step.plan.factors:
        rows = curvature[factor.owner].get(f"{factor.side}_rows")
        assert factor.columns == (None if rows is None else rows.shape[1])
        if rows is not None:
            assert rows.shape == (factor.count, factor.columns, factor.dim)


@pytest.mark.parametrize("sizes", [(4, 2, 7), (2, 60, 3)])
def test_batches_of_other_sizes_equal_the_dense_formula(sizes: tuple[int, ...]) -> None:
    """A smaller last batch is padded, a larger one makes the state grow, up to as many rows as columns."""
    model, batches = conv_net(), [images(size) for size in sizes]
    found, step = run(model, skfac(), batches, lr=0.1)
    assert_equal(found, run(model, kfac(), batches, lr=0.1, sharing="reduce")[0])
    state = step.state_dict()["curvature"]["7.weight"]
    assert state["A_rows"].shape == (1, min(max(sizes), 41), 41)


@pytest.mark.parametrize("sizes", [(3, 2, 60, 4, 5, 6), (3, 20, 4, 5, 6)], ids=["over-d", "under-d"])
def test_a_window_that_grows_to_d_rows_averages_over_all_batches(sizes: tuple[int, ...]) -> None:
    """As a factor that is dense from the start: d x d is all that is held, twice."""
    model, batches, decay = wide_net(), [vectors(size) for size in sizes], 0.6
    found, step = run(model, skfac(window=3, decay=decay), batches, lr=0.1)
    assert_equal(found, run(model, kfac(decay=decay), batches, lr=0.1)[0])
    state = step.state_dict()["curvature"]["0.weight"]
    for name, d in (("A", 51), ("G", 40)):
        assert state[f"{name}_rows"].shape == (1, d, d)
        assert state[f"{name}_z"].shape[1] <= d


@pytest.mark.parametrize("parts", [(5, 2), (1, 1, 3)])
def test_accumulated_parts_equal_the_dense_formula_of_the_whole(parts: tuple[int, ...]) -> None:
    model, batches = conv_net(), [images(sum(parts)) for _ in range(3)]
    expected, _ = run(model, kfac(inverse_every=2), batches, lr=0.1, sharing="reduce")
    copy = twin(model)
    step = compiled(copy, skfac(inverse_every=2))
    for x, y in batches:
        for x_part, y_part in zip(x.split(parts), y.split(parts), strict=True):
            step.accumulate(x_part, y_part)
        step.update()
    named = dict(model.named_parameters())
    assert_equal({n: (named[n] - p).detach() for n, p in copy.named_parameters()}, expected)
    assert step.state_dict()["curvature"]["7.weight"]["A_rows"].shape[1] == sum(parts)


def test_a_state_that_grew_is_saved_and_continues_bit_for_bit(tmp_path: Any) -> None:
    method = skfac(window=2, inverse_every=2)
    batches = [vectors(size) for size in (4, 9, 3, 9, 4, 3)]
    model = wide_net()
    step = compiled(model, method)
    for size in (2, 3):
        step.accumulate(*vectors(size))
    step.update()
    run_step(step, batches[:3])
    torch.save({"model": model.state_dict(), "step": step.state_dict()}, tmp_path / "state.pt")
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    run_step(step, batches[3:])
    other = wide_net()
    other.load_state_dict(kept["model"])
    again = compiled(other, method)
    again.load_state_dict(kept["step"])
    run_step(again, batches[3:])
    assert differing(snapshot(other, again), snapshot(model, step)) == []


class Uses(nn.Module):
    """Batched experts, a convolution that is called twice, an embedding tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.experts = nn.Embedding(9, 18), nn.Parameter(torch.randn(3, 18, 18) / 4)
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.table(tokens).mean(1)).unsqueeze(1)
        x = self.conv(torch.tanh(self.conv(x))).squeeze(1)
        x = torch.bmm(x.unsqueeze(0).expand(3, -1, -1), self.experts).mean(0)
        return F.linear(x, self.table.weight)


@pytest.mark.parametrize("size", [4, 40], ids=["thin", "dense"])
def test_experts_repeated_uses_and_tied_weights_equal_dense_kfac(size: int) -> None:
    model, batch = Uses().double(), (torch.randint(9, (size, 5)), torch.randint(9, (size,)))
    found, step = run(model, skfac(), [batch], sharing="reduce")
    assert_equal(found, run(model, kfac(), [batch], sharing="reduce")[0])
    assert ("A_z" in step.state_dict()["curvature"]["experts"]) == (size == 4)


class Readers(nn.Module):
    """Three layers that read the input; the first may be frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(50, 40) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.q(x)) * torch.tanh(self.k(x)) + torch.tanh(self.v(x))


def test_layers_that_read_one_input_keep_its_rows_once() -> None:
    model, batch = Readers().double(), (doubles(4, 50), torch.randint(40, (4,)))
    found, step = run(model, skfac(), [batch])
    states = step.state_dict()["curvature"]
    assert states["q.weight"]["A_rows"] is states["k.weight"]["A_rows"] is states["v.weight"]["A_rows"]
    assert states["q.weight"]["A_z"] is not states["k.weight"]["A_z"], "the damping differs"
    assert_equal(found, run(model, kfac(), [batch])[0])


def test_a_reader_that_joins_at_another_batch_size_keeps_rows_of_its_own() -> None:
    """The later ones are laid out dense: one owner could not serve both."""
    model = Readers().double()
    model.q.requires_grad_(False)
    step = compiled(model, skfac())
    step(doubles(4, 50), torch.randint(40, (4,)))
    model.q.requires_grad_(True)
    before, (x, y) = twin(model), (doubles(60, 50), torch.randint(40, (60,)))
    step(x, y)
    states = step.state_dict()["curvature"]
    assert "A" in states["q.weight"] and "A_rows" in states["k.weight"]
    expected, _ = run(before, kfac(), [(x, y)], lr=0.1)
    named = dict(before.named_parameters())
    assert_equal({n: (named[n] - p).detach() for n, p in model.named_parameters()}, expected)


def test_norms_keep_their_plain_gradient_and_the_plan_says_why() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    x, y = doubles(4, 6), torch.randint(3, (4,))
    found, step = run(model, skfac(), [(x, y)])
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), [model[1].weight, model[1].bias])
    assert torch.equal(found["1.weight"], model[1].weight - (model[1].weight - grads[0]))
    skipped = {s.parameter: (s.reason, s.detail) for s in step.plan.skipped}
    assert set(skipped) == {"1.weight", "1.bias"}
    assert all(reason is Reason.METHOD and "norms" in detail for reason, detail in skipped.values())


@pytest.mark.parametrize(("size", "skipped"), [(4, set()), (60, {"0.weight", "0.bias"})])
def test_the_largest_factor_bounds_dense_sides_alone(size: int, skipped: set[str]) -> None:
    plan = kfac_fx.inspect(wide_net(), F.cross_entropy, *vectors(size), method=skfac(max_factor_dim=45))
    assert {s.parameter for s in plan.skipped if s.reason is Reason.TOO_LARGE} == skipped


def test_a_factor_that_cannot_be_inverted_keeps_its_last_z_and_is_counted() -> None:
    method, model = skfac(damping=1e-30), wide_net()
    step = compiled(model, method)
    step(*vectors(4))
    state = step.state_dict()["curvature"]["0.weight"]
    huge = torch.full_like(state["A_rows"], float("inf"))
    states = {"0.weight": state | {"A_rows": huge}, "1.weight": state}
    new, refreshed = method.refresh(states, counts=dict.fromkeys(states, 1))
    assert torch.equal(new["0.weight"]["A_z"], state["A_z"])
    assert torch.equal(new["0.weight"]["A_gamma"], state["A_gamma"])
    assert int(refreshed.kept_last) == 1
    assert relative_error(new["1.weight"]["A_z"], state["A_z"]) < 1e-6


def test_the_published_schedule_and_base_optimizer_are_the_defaults() -> None:
    method = kfac_fx.SKFAC()
    assert (method.statistics_every, method.inverse_every, method.window) == (834, 834, 1)
    (group,) = method.base_optimizer(list(nn.Linear(2, 2).parameters())).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.00625, 0.9, 5e-4)
    assert method.kl_clip is None and DAMPING != method.damping == 0.03
