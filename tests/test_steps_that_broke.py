"""Steps that once went wrong: batches that alias or shrink, sums of losses, failures in the middle of a step.

The reference is plain PyTorch, dense algebra, or a twin that never met the failure.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx import errors
from kfac_fx.curvature import Curvature
from tests.oracles import append_one, relative_error
from tests.training import (
    Identity,
    differing,
    distance,
    plain_step,
    run_plain,
    run_step,
    sgd,
    snapshot,
    twin,
)

TOLERANCE = 1e-10
Loss = Callable[[Tensor, Tensor], Tensor]
EVERY_STEP = kfac_fx.KFAC(statistics_every=1, inverse_every=1)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def normalised() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    return randn(size, 4), torch.randint(3, (size,))


def compiled(model: nn.Module, loss_fn: Loss = F.cross_entropy, **options: object) -> kfac_fx.TrainStep:
    chosen = {"optimizer": sgd(model), "backend": "eager", **options}
    return kfac_fx.compile(model, loss_fn, **chosen)


# ---------------------------------------------------------------- batches


def test_a_first_batch_that_is_its_own_target_does_not_tie_later_ones_to_theirs() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 4)).double()
    plain, x = twin(model), randn(6, 4)
    batches = [(x, x), (randn(6, 4), 10 * randn(6, 4)), (randn(6, 4), randn(6, 4))]
    expected = run_plain(plain, nn.MSELoss(), sgd, batches)
    found = run_step(compiled(model, nn.MSELoss(), method=Identity()), batches)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)
    assert distance(snapshot(model), snapshot(plain)) < 1e-12


class RootMeanSquare(nn.Module):
    """A normalisation with a scale alone, written by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, RootMeanSquare])
def test_a_last_batch_of_one_example_keeps_the_layers_and_has_its_own_factors(
    norm: Callable[[int], nn.Module],
) -> None:
    model = nn.Sequential(nn.Linear(4, 6), norm(6), nn.Linear(6, 3)).double()
    step = compiled(model, method=kfac_fx.KFAC(statistics_every=1, decay=0.0))
    step(*batch(5))
    shapes = {k: {n: t.shape for n, t in v.items()} for k, v in step.state_dict()["curvature"].items()}
    assert set(shapes) == {"0.weight", "1.weight", "2.weight"}
    x, y = batch(1)
    hidden = model[0](x).detach()
    out = model[1](hidden).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model[2](out), y), out)
    scaled = (out.detach() / model[1].weight.detach()) if norm is not nn.LayerNorm else None
    normed = F.layer_norm(hidden, (6,)) if scaled is None else scaled
    parts = [g * normed, g] if norm is nn.LayerNorm else [g * normed]
    rows = torch.stack(parts, -1)[0]
    step(x, y)
    state = step.state_dict()["curvature"]
    assert {k: {n: t.shape for n, t in v.items()} for k, v in state.items()} == shapes
    assert relative_error(state["1.weight"]["F"], rows[:, :, None] * rows[:, None, :]) < TOLERANCE
    a = append_one(x)
    assert relative_error(state["0.weight"]["A"][0], a.T @ a) < TOLERANCE


def summed_over_count(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="sum") / len(targets)


def terms_summed(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none").sum()


def squares_summed(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, F.one_hot(targets, 3).double(), reduction="none").sum()


@pytest.mark.parametrize("method", ["identity", "kfac"])
@pytest.mark.parametrize("loss_fn", [summed_over_count, terms_summed, squares_summed])
def test_two_unequal_halves_equal_the_whole_for_losses_reduced_by_hand(loss_fn: Loss, method: str) -> None:
    model, (x, y) = net(), batch(9)
    whole, halves = twin(model), twin(model)
    rule = Identity() if method == "identity" else kfac_fx.KFAC()
    if method == "identity":
        plain_step(whole, loss_fn, sgd(whole), (x, y))
    else:
        compiled(whole, loss_fn, method=rule)(x, y)
    step = compiled(halves, loss_fn, method=rule)
    for part in (slice(0, 2), slice(2, 9)):
        step.accumulate(x[part], y[part])
    step.update()
    assert distance(snapshot(halves), snapshot(whole)) < TOLERANCE
    assert distance(snapshot(whole), snapshot(model)) > 1e-4


# ---------------------------------------------------------------- failures in a step


def root_of_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.sqrt((outputs - targets).pow(2).sum(1)).mean()


@pytest.mark.parametrize("every", [1, 100], ids=["step of statistics", "plain step"])
def test_a_finite_loss_whose_gradient_is_not_finite_is_named_and_changes_nothing(every: int) -> None:
    model, x = normalised(), randn(6, 4)
    step = compiled(model, root_of_squares, method=kfac_fx.KFAC(statistics_every=every, inverse_every=every))
    step(randn(6, 4), randn(6, 3))
    with torch.no_grad():
        perfect = twin(model)(x)
    before = snapshot(model, step)
    with pytest.raises(errors.NonFiniteLossError, match="gradient"):
        step(x, perfect)
    assert differing(snapshot(model, step), before) == []
    assert torch.isfinite(step(randn(6, 4), randn(6, 3)))
    assert differing(snapshot(model, step), before)


@pytest.mark.parametrize("good_steps", [0, 1])
def test_a_step_that_fails_in_its_refresh_changes_nothing_and_the_next_one_works(
    good_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = normalised()
    step, never = compiled(model, method=EVERY_STEP), compiled(other := twin(model), method=EVERY_STEP)
    batches = [batch() for _ in range(3)]
    run_step(step, batches[:good_steps])
    run_step(never, batches[:good_steps])
    before = snapshot(model, step if good_steps else None)

    def out_of_memory(curvature: Curvature, method: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(Curvature, "refresh", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            step(*batches[1])
    assert differing(snapshot(model, step if good_steps else None), before) == []
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(step(*batches[2]), never(*batches[2]))
    assert differing(snapshot(model, step), snapshot(other, never)) == []


def test_an_update_that_fails_can_be_repeated_and_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    step, never = compiled(model, method=EVERY_STEP), compiled(other := twin(model), method=EVERY_STEP)
    batches = [batch() for _ in range(2)]

    def out_of_memory(curvature: Curvature, method: object) -> None:
        raise RuntimeError("out of memory")

    for one in (step, never):
        one(*batches[0])
        one.accumulate(*batches[1])
    with monkeypatch.context() as patched:
        patched.setattr(Curvature, "refresh", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            step.update()
    step.update()
    never.update()
    assert differing(snapshot(model, step), snapshot(other, never)) == []


def test_discarded_batches_leave_no_trace() -> None:
    model = net()
    step, never = compiled(model, method=EVERY_STEP), compiled(other := twin(model), method=EVERY_STEP)
    step.accumulate(*batch(5))
    step.accumulate(*batch(6))
    step.discard()
    with pytest.raises(errors.KfacFxError, match="accumulate"):
        step.update()
    x, y = batch()
    assert torch.equal(step(x, y), never(x, y))
    assert differing(snapshot(model, step), snapshot(other, never)) == []


class Failing(torch.optim.SGD):
    """Raises in its step while `fails` is set."""

    fails = False

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if self.fails:
            raise RuntimeError("the optimizer failed")
        super().step(closure)


@pytest.mark.parametrize("every", [1, 100], ids=["step of statistics", "plain step"])
def test_an_optimizer_that_fails_leaves_curvature_counter_and_gradients_as_before(every: int) -> None:
    model, method = net(), kfac_fx.KFAC(statistics_every=every, inverse_every=every)
    optimizer = Failing(model.parameters(), lr=0.05, momentum=0.9)
    step = compiled(model, optimizer=optimizer, method=method)
    never = compiled(other := twin(model), method=method)
    batches = [batch() for _ in range(3)]
    assert torch.equal(step(*batches[0]), never(*batches[0]))
    before = snapshot(model, step)
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="the optimizer failed"):
        step(*batches[1])
    assert differing(snapshot(model, step), before) == []
    assert step.state_dict()["step"] == 1
    assert all(parameter.grad is None for parameter in model.parameters())
    optimizer.fails = False
    assert torch.equal(step(*batches[2]), never(*batches[2]))
    assert differing(snapshot(model, step), snapshot(other, never)) == []


# ---------------------------------------------------------------- optimizers and layers that change


def test_an_optimizer_that_calls_a_closure_is_refused_at_compile() -> None:
    model = net()
    with pytest.raises(errors.OptimizerMismatchError, match="closure"):
        compiled(model, optimizer=torch.optim.LBFGS(model.parameters()))


@pytest.mark.parametrize("steps", [0, 1], ids=["before the first step", "after a step"])
@pytest.mark.parametrize("name", ["0.weight", "2.bias"])
def test_a_parameter_that_was_taken_from_the_optimizer_is_named(name: str, steps: int) -> None:
    model = net()
    optimizer = sgd(model)
    step = compiled(model, optimizer=optimizer)
    x, y = batch()
    for _ in range(steps):
        step(x, y)
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if p is not model.get_parameter(name)]
    before = snapshot(model)
    with pytest.raises(errors.OptimizerMismatchError, match=name.replace(".", r"\.")):
        step(x, y)
    assert differing(snapshot(model), before) == []


def test_a_layer_that_is_unfrozen_later_is_preconditioned_in_the_same_step() -> None:
    """Its direction is that of dense inverses of its own first factors, though no refresh is due."""
    damping, lr, model = 0.02, 0.1, net()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    method = kfac_fx.KFAC(damping=damping, inverse_every=1000, statistics_every=1000, kl_clip=None)
    model[0].requires_grad_(False)
    step = compiled(model, optimizer=optimizer, method=method)
    for _ in range(3):
        step(*batch())
    model[0].requires_grad_(True)
    x, y = batch()
    hidden = model[0](x)
    (g,) = torch.autograd.grad(F.cross_entropy(model[2](torch.tanh(hidden)), y), hidden)
    rows = append_one(x)
    A, G = rows.T @ rows / len(x), g.T @ g * len(x)
    pi = math.sqrt(float(A.trace() / len(A)) / float(G.trace() / len(G)))
    A_inverse = torch.linalg.inv(A + pi * math.sqrt(damping) * torch.eye(len(A)).double())
    G_inverse = torch.linalg.inv(G + math.sqrt(damping) / pi * torch.eye(len(G)).double())
    direction = G_inverse @ (g.T @ rows) @ A_inverse
    before = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach()
    step(x, y)
    change = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach() - before
    state = step.state_dict()["curvature"]["0.weight"]
    assert relative_error(state["A_inverse"][0], A_inverse) < TOLERANCE
    assert relative_error(state["G_inverse"][0], G_inverse) < TOLERANCE
    assert relative_error(change, -lr * direction) < TOLERANCE


def test_a_batch_norm_that_reads_the_batch_itself_changes_its_buffers_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)).double()
    plain, batches = twin(model), [batch(5), batch(5)]
    expected = run_plain(plain, F.cross_entropy, sgd, batches)
    found = run_step(compiled(model, F.cross_entropy, method=Identity()), batches)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)
    assert distance(snapshot(model), snapshot(plain)) < 1e-12
