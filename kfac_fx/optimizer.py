"""Between the user's torch optimizer and the step: learning rates of the layers, gradients to the parameters.

Enters: plans and gradients by name. Leaves: what the optimizer's own `step` does with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from kfac_fx import guards
from kfac_fx.contracts import Plan


@final
class OptimizerLink:
    """A model's torch optimizer, seen from the step."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._rates: tuple[tuple[float, ...], Tensor] | None = None
        guards.check_optimizer(optimizer, model)

    def check(self) -> None:
        """Raise `OptimizerMismatchError` unless it still holds exactly the trainable parameters."""
        guards.check_optimizer(self._optimizer, self._model)

    def learning_rates(self, plan: Plan) -> Tensor:
        """Learning rate of each matched layer, from the parameter groups: [layers]."""
        rate_of = {
            id(p): float(group["lr"]) for group in self._optimizer.param_groups for p in group["params"]
        }
        parameters = dict(self._model.named_parameters())
        if any(id(p) not in rate_of for p in parameters.values() if p.requires_grad):
            self.check()
        rates = tuple(rate_of[id(parameters[match.weight])] for match in plan.matched)
        if self._rates is None or self._rates[0] != rates:
            dtype = plan.capture.inverse_scale.meta["val"].dtype
            self._rates = (rates, torch.tensor(rates, dtype=dtype, device=guards.model_device(self._model)))
        return self._rates[1]

    def apply(self, gradients: Mapping[str, Tensor]) -> None:
        """One step of the optimizer with these gradients; none is left behind."""
        for name, parameter in self._model.named_parameters():
            parameter.grad = gradients.get(name)
        try:
            self._optimizer.step()
        finally:
            for parameter in self._model.parameters():
                parameter.grad = None
