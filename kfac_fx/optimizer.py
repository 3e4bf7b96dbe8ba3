"""Between the user's torch optimizer and the step: learning rates of the layers, gradients to the parameters.

Enters: plans and gradients by name. Leaves: what the optimizer's own `step` does with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from kfac_fx import guards, host
from kfac_fx.contents import Contents
from kfac_fx.errors import OptimizerMismatchError
from kfac_fx.planned import Plan


@final
class OptimizerLink:
    """A model's torch optimizer, seen from the step.

    whole: whether what it is given is the whole update, which it has to subtract as it is.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, whole: bool) -> None:
        self._model = model
        self._optimizer = optimizer
        self._whole = whole
        self._rates: tuple[tuple[float, ...], Tensor] | None = None
        self.check()

    def check(self) -> None:
        """Raise `OptimizerMismatchError` unless it holds exactly the trainable parameters, and fits."""
        guards.check_optimizer(self._optimizer, self._model)
        if self._whole:
            _check_plain_sgd(self._optimizer)

    def learning_rates(self, contents: Contents, plan: Plan) -> Tensor:
        """Learning rate of each matched layer, from the parameter groups: [layers]. contents: the model's."""
        rate_of = {
            id(p): float(group["lr"]) for group in self._optimizer.param_groups for p in group["params"]
        }
        parameters = contents.parameters
        if any(id(p) not in rate_of for p in parameters.values() if p.requires_grad):
            self.check()
        rates = tuple(rate_of[id(parameters[match.weight])] for match in plan.matched)
        if self._rates is None or self._rates[0] != rates:
            dtype = plan.capture.inverse_scale.meta["val"].dtype
            device = guards.model_device(self._model)
            self._rates = (rates, host.to_device(rates, dtype=dtype, device=device))
        return self._rates[1]

    def apply(self, contents: Contents, gradients: Mapping[str, Tensor]) -> None:
        """One step of the optimizer with these gradients; none is left behind. contents: of the model."""
        if self._whole:
            _check_plain_sgd(self._optimizer)
        try:
            for name, parameter in contents.parameters.items():
                parameter.grad = gradients.get(name) if parameter.requires_grad else None
            self._optimizer.step()
        finally:
            for parameter in contents.parameters.values():
                parameter.grad = None


def _check_plain_sgd(optimizer: torch.optim.Optimizer) -> None:
    """Raise `OptimizerMismatchError` unless the optimizer adds the update as it is."""
    wanted = {"lr": 1, "momentum": 0, "weight_decay": 0, "maximize": False}
    wrong = [
        f"{name}={float(group[name]):g}"
        for group in optimizer.param_groups
        for name, value in wanted.items()
        if name in group and float(group[name]) != value
    ]
    if type(optimizer) is torch.optim.SGD and not wrong:
        return
    found = f"{type(optimizer).__name__}({', '.join(dict.fromkeys(wrong))})"
    raise OptimizerMismatchError(
        f"quadratic_model=True computes the whole update, its length and its momentum, but the optimizer is "
        f"{found}. Use optimizer=None or torch.optim.SGD(parameters, lr=1.0) without momentum, weight decay "
        "and schedule; for a penalty eta/2 |theta|^2 pass l2=eta to the method."
    )
