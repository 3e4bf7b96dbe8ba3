"""Short ways into the library for the oracle tests: the factors of one batch, the effect of one step."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kfac_fx

Curvature = dict[str, dict[str, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class StepResult:
    """What one step with plain SGD leaves: the curvature state and what was added to each parameter."""

    curvature: Curvature
    change: dict[str, Tensor]


def one_step(
    model: nn.Module,
    loss_fn: Loss,
    inputs: Tensor,
    targets: Tensor,
    *,
    method: kfac_fx.KFAC,
    fisher: str,
    sharing: str = "expand",
    lr: float = 1.0,
) -> StepResult:
    """One training step on a copy of the model; the change is -lr times the direction."""
    twin = copy.deepcopy(model)
    step = kfac_fx.compile(
        twin,
        loss_fn,
        method=method,
        optimizer=torch.optim.SGD(twin.parameters(), lr=lr),
        fisher=fisher,
        sharing=sharing,
        backend="eager",
    )
    step(inputs, targets)
    before = dict(model.named_parameters())
    change = {name: (after - before[name]).detach() for name, after in twin.named_parameters()}
    return StepResult(step.state_dict()["curvature"], change)


def batch_factors(
    model: nn.Module, loss_fn: Loss, inputs: Tensor, targets: Tensor, *, fisher: str, sharing: str
) -> Curvature:
    """Curvature state after one step at learning rate 0 on a copy of the model, keyed by weight name."""
    method = kfac_fx.KFAC(statistics_every=1, inverse_every=1)
    return one_step(
        model, loss_fn, inputs, targets, method=method, fisher=fisher, sharing=sharing, lr=0.0
    ).curvature


def factor_reader(
    model: nn.Module, loss_fn: Loss, *, fisher: str, sharing: str = "expand"
) -> Callable[[Tensor, Tensor], Curvature]:
    """A function from a batch to its factors at the model's current values, captured once per batch shape.

    The moving average forgets everything (decay 0), so that every state is that of its own batch.
    """
    step = kfac_fx.compile(
        model,
        loss_fn,
        method=kfac_fx.KFAC(statistics_every=1, inverse_every=1_000_000, decay=0.0),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        fisher=fisher,
        sharing=sharing,
        backend="eager",
    )

    def read(inputs: Tensor, targets: Tensor) -> Curvature:
        step(inputs, targets)
        curvature = step.state_dict()["curvature"]
        return {
            name: {key: value.clone() for key, value in state.items()} for name, state in curvature.items()
        }

    return read


def gradients(model: nn.Module, loss_fn: Loss, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Autograd's gradient of the loss for every parameter."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss_fn(model(inputs), targets), list(named.values()))
    return dict(zip(named, found, strict=True))
