"""What the quadratic model leaves alone, and what it refuses: buffers, random numbers, losses, optimizers."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fx
from kfac_fx.errors import CaptureError, LossError, NonFiniteLossError, OptimizerMismatchError
from kfac_fx.forward import forward_program
from kfac_fx.traced import Capture
from tests import zoo
from tests.training import differing, run_step, snapshot

METHOD = kfac_fx.KFAC(
    quadratic_model=True, adaptive_damping=True, adapt_every=1, damping=1.0, inverse_every=2
)


def batch(*shape: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(shape), torch.randint(classes, shape[:1])


def mlp(middle: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), middle or nn.Tanh(), nn.Linear(6, 3))


def test_buffers_change_once_per_step_and_no_random_number_is_drawn() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    x, y = batch(5, 2, 4, 4)
    step = kfac_fx.compile(model, F.cross_entropy, method=METHOD, backend="eager")
    for _ in range(3):
        plain = copy.deepcopy(model)
        plain(x)
        torch.manual_seed(9)
        step(x, y)
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(9)))
        assert differing(dict(plain.named_buffers()), dict(model.named_buffers())) == []


def test_a_model_that_reads_the_buffer_it_changes_is_modelled_as_the_step_ran_it() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.mean.mul_(0.5).add_(0.5 * x.mean(0))
            return self.linear(x - self.mean)

    torch.manual_seed(0)
    model = Centred().double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    method = kfac_fx.KFAC(
        quadratic_model=True, adaptive_damping=True, adapt_every=1, damping=1e-8, inverse_every=1
    )
    step = kfac_fx.compile(model, F.mse_loss, method=method, fisher="type2", backend="eager")
    step(x, y)
    assert step.reduction_ratio == pytest.approx(1.0, abs=1e-5)  # quadratic in the parameters
    assert torch.allclose(model.mean, 0.5 * x.mean(0))


@pytest.mark.parametrize("name", ["batched_experts", "tied_autoencoder", "frozen_backbone", "reused_layer"])
def test_families_of_layers_train(name: str) -> None:
    example = zoo.MODELS[name]()
    step = kfac_fx.compile(example.model, example.loss_fn, method=METHOD, backend="eager")
    losses = [float(step(example.inputs, example.targets)) for _ in range(6)]
    assert losses[-1] < losses[0]


def test_smaller_last_batches_share_the_last_update() -> None:
    x, y = batch(8, 4)
    model = mlp()
    step = kfac_fx.compile(model, F.cross_entropy, method=METHOD, backend="eager")
    losses = run_step(step, [(x, y), (x[:3], y[:3]), (x, y), (x[:3], y[:3]), (x, y)])
    assert float(losses[-1]) < float(losses[0])


def test_both_backends_agree() -> None:
    x, y = batch(8, 4)
    losses = []
    for backend in ("eager", "inductor"):
        model = mlp().double()
        step = kfac_fx.compile(model, F.cross_entropy, method=METHOD, backend=backend)
        losses.append(torch.stack(run_step(step, [(x.double(), y)] * 4)))
    assert torch.allclose(losses[0], losses[1], rtol=1e-9)


# ---------------------------------------------------------------- what it refuses


def test_random_forwards_are_refused_with_the_line_that_draws() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x + 0.1 * torch.randn_like(x))

    x, y = batch(5, 4)
    for model, where in (
        (Noisy(), r"test_quadratic_limits.py:\d+ \(return self.linear\(x"),
        (mlp(nn.Dropout()), "drawn at aten.bernoulli_"),
    ):
        step = kfac_fx.compile(model, F.cross_entropy, method=METHOD, backend="eager")
        with pytest.raises(CaptureError, match=where):
            step(x, y)
    quiet = kfac_fx.compile(mlp(nn.Dropout()).eval(), F.cross_entropy, method=METHOD, backend="eager")
    assert torch.isfinite(quiet(x, y))


def test_losses_of_unknown_curvature_are_refused() -> None:
    x, y = batch(5, 4)
    model = mlp()
    unknown: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "it is none of them": lambda f, y: f.abs().mean(),
        "other terms beside them.*l2=eta": lambda f, y: (
            F.cross_entropy(f, y) + model[0].weight.square().sum()
        ),
    }
    for message, loss_fn in unknown.items():
        step = kfac_fx.compile(model, loss_fn, method=METHOD, backend="eager")
        with pytest.raises(LossError, match=message):
            step(x, y)


def test_replaced_gradients_are_refused_and_nothing_changes() -> None:
    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return torch.round(4 * x) / 4

        @staticmethod
        def backward(ctx: object, *grad: Tensor) -> Tensor:
            return grad[0]

    class Middle(nn.Module):
        def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: Tensor) -> Tensor:
            return self.function(x)

    x, y = batch(5, 4)
    for function in (Rounded.apply, lambda h: h * h.detach()):
        model = mlp(Middle(function))
        step = kfac_fx.compile(model, F.cross_entropy, method=METHOD, backend="eager")
        before = snapshot(model)
        with pytest.raises(CaptureError, match="stops or replaces gradients"):
            step(x, y)
        assert differing(before, snapshot(model)) == []


def test_optimizers_that_would_change_the_update_are_refused() -> None:
    for make in (
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=1.0, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=1.0),
    ):
        model = mlp()
        with pytest.raises(OptimizerMismatchError, match="quadratic_model=True computes the whole update"):
            kfac_fx.compile(model, F.cross_entropy, method=METHOD, optimizer=make(model.parameters()))
    step = kfac_fx.compile(mlp(), F.cross_entropy, method=METHOD, backend="eager")
    x, y = batch(5, 4)
    step(x, y)
    step.optimizer.param_groups[0]["lr"] = 0.5
    before = snapshot(step.model, step)
    with pytest.raises(OptimizerMismatchError, match="lr=0.5"):
        step(x, y)
    assert differing(before, snapshot(step.model, step)) == []


def test_accumulation_is_refused() -> None:
    step = kfac_fx.compile(mlp(), F.cross_entropy, method=METHOD, backend="eager")
    with pytest.raises(kfac_fx.KfacFxError, match="quadratic_model=False to accumulate"):
        step.accumulate(*batch(5, 4))


def test_a_batch_without_a_finite_loss_changes_nothing() -> None:
    x, y = batch(5, 4)
    step = kfac_fx.compile(mlp(), F.cross_entropy, method=METHOD, backend="eager")
    run_step(step, [(x, y)] * 2)
    before = snapshot(step.model, step)
    with pytest.raises(NonFiniteLossError):
        step(x * float("nan"), y)
    assert differing(before, snapshot(step.model, step)) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adaptive_damping": True}, "adaptive_damping=True.*needs quadratic_model=True"),
        ({"l2": 0.1}, "l2=0.1.*needs quadratic_model=True"),
        ({"quadratic_model": True, "l2": -1.0}, "l2=-1.0.*not negative"),
        ({"quadratic_model": True, "damping_rule": "relative"}, "damping_rule='relative'.*needs one of"),
        ({"quadratic_model": True, "adaptive_damping": True, "damping": 0.0}, "damping=0.0.*positive"),
        ({"adapt_every": 0}, "adapt_every=0.*at least 1"),
        ({"adapt_rate": 1.0}, "adapt_rate=1.0.*lie in"),
        ({"damping_bounds": (2.0, 1.0)}, "damping_bounds=.*in order"),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kfac_fx.KFAC(**settings)  # type: ignore[arg-type]


class Distances(nn.Module):
    """torch.cdist has no forward-mode derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, x)[:, :6]


def test_an_operator_without_forward_mode_is_named_with_its_line_and_the_remedy() -> None:
    x, y = batch(8, 4)
    model = mlp(Distances())
    step = kfac_fx.compile(model, F.cross_entropy, method=METHOD, backend="eager")
    before = snapshot(model)
    with pytest.raises(
        CaptureError, match=r"_cdist_forward at .*test_quadratic_limits.py:\d+ .*quadratic_model=False"
    ):
        step(x, y)
    assert differing(before, snapshot(model)) == []


def test_another_failure_of_the_forward_is_not_taken_for_a_missing_derivative() -> None:
    forward = forward_program(capture_of(mlp()))
    parameters, (x, y) = dict(mlp().named_parameters()), batch(5, 4)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        forward.derivative(parameters, (*parameters.values(), x[:, :2], y))


def capture_of(model: nn.Module) -> Capture:
    return kfac_fx.inspect(model, F.cross_entropy, *batch(5, 4)).capture
