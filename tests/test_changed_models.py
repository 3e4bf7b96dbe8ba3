"""Models that change: while they are traced, between the batches of one update, after they were compiled."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx import errors


class Registering(nn.Module):
    """Registers a buffer, a parameter and a module of its child when it runs for the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Sequential(nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self.child, "scale"):
            self.child.register_buffer("scale", torch.full((3,), 2.0))
            self.child.register_parameter("shift", nn.Parameter(torch.ones(3)))
            self.child.add_module("last", nn.Tanh())
        found: dict[str, Tensor] = {**self.child._buffers, **self.child._parameters}  # type: ignore[dict-item]
        return self.child(x) * found["scale"] + found["shift"]


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 4), torch.randint(3, (5,))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_model_that_registers_when_it_runs_is_refused_and_left_as_it_was() -> None:
    model = Registering()
    before = tensors(model)
    told = r"buffer child\.scale.* Register them in __init__, or run the model once"
    with pytest.raises(errors.CaptureError, match=told) as caught:
        kfac_fx.inspect(model, F.cross_entropy, *batch())
    assert "parameter child.shift" in str(caught.value) and "module child.last" in str(caught.value)
    with pytest.raises(errors.CaptureError, match="child.scale"):
        kfac_fx.compile(model, F.cross_entropy)(*batch())
    torch.testing.assert_close(tensors(model), before, rtol=0, atol=0)
    assert [name for name, _ in model.named_modules()] == ["", "child", "child.0"]
    model(batch()[0])
    step = kfac_fx.compile(model, F.cross_entropy)
    assert all(torch.isfinite(step(*batch())) for _ in range(3))


def test_lazy_parameters_without_a_size_are_named() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    for call, given in ((kfac_fx.compile, ()), (kfac_fx.inspect, batch()), (kfac_fx.verify, batch())):
        with pytest.raises(errors.KfacFxError, match=r"lazy parameters without a size \(0.weight, 0.bias\)"):
            call(model, F.cross_entropy, *given)
    model(batch()[0])
    assert torch.isfinite(kfac_fx.compile(model, F.cross_entropy)(*batch()))


def removed(model: nn.Sequential) -> None:
    del model[2]


def replaced(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(torch.zeros(3, 6))


def cast(model: nn.Sequential) -> None:
    model[2].double()


@pytest.mark.parametrize("change", [removed, replaced, cast])
def test_a_model_that_changed_is_refused_at_update(change: Callable[[nn.Module], None]) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    step = kfac_fx.compile(model, F.cross_entropy)
    step.accumulate(*batch())
    change(model)
    before = tensors(model)
    with pytest.raises(errors.ModelChangedError, match="2.weight"):
        step.update()
    torch.testing.assert_close(tensors(model), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_parameter_frozen_before_update_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    step = kfac_fx.compile(model, F.cross_entropy)
    step.accumulate(*batch())
    model[0].requires_grad_(False)
    before = copy.deepcopy(model)
    step.update()
    assert torch.equal(model[0].weight, before[0].weight) and torch.equal(model[0].bias, before[0].bias)
    assert not torch.equal(model[2].weight, before[2].weight)


def test_an_optimizer_that_raises_leaves_no_gradient() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            raise RuntimeError("full")

    model = nn.Linear(4, 3)
    step = kfac_fx.compile(model, F.cross_entropy, optimizer=Failing(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="full"):
        step(*batch())
    assert model.weight.grad is None and model.bias.grad is None


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate = nn.Linear(4, 3), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.gate


@pytest.mark.parametrize("method", ["kfac", "nkfac"])
def test_parameters_without_axes_are_verified(method: str) -> None:
    found = kfac_fx.verify(Gated(), F.cross_entropy, *batch(), method=method)
    assert not found.violations
