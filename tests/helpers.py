"""Short ways into the library for the oracle tests: the factors of one batch, the effect of one step."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import kfac_fx

Curvature = dict[str, dict[str, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


def batch_factors(
    model: nn.Module, loss_fn: Loss, inputs: Tensor, targets: Tensor, *, fisher: str, sharing: str
) -> Curvature:
    """Curvature state after one step at learning rate 0 on a copy of the model, keyed by weight name."""
    twin = copy.deepcopy(model)
    step = kfac_fx.compile(
        twin,
        loss_fn,
        method=kfac_fx.KFAC(statistics_every=1, inverse_every=1),
        optimizer=torch.optim.SGD(twin.parameters(), lr=0.0),
        fisher=fisher,
        sharing=sharing,
        backend="eager",
    )
    step(inputs, targets)
    return step.state_dict()["curvature"]


def parameter_change(
    model: nn.Module,
    loss_fn: Loss,
    inputs: Tensor,
    targets: Tensor,
    *,
    method: kfac_fx.KFAC,
    fisher: str,
    sharing: str = "expand",
    lr: float = 1.0,
) -> dict[str, Tensor]:
    """What one step with plain SGD adds to each parameter of a copy of the model: -lr times the direction."""
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=lr)
    step = kfac_fx.compile(
        twin, loss_fn, method=method, optimizer=optimizer, fisher=fisher, sharing=sharing, backend="eager"
    )
    step(inputs, targets)
    before = dict(model.named_parameters())
    return {name: (after - before[name]).detach() for name, after in twin.named_parameters()}


def gradients(model: nn.Module, loss_fn: Loss, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Autograd's gradient of the loss for every parameter."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss_fn(model(inputs), targets), list(named.values()))
    return dict(zip(named, found, strict=True))
