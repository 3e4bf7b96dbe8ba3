"""What can be timed: the protocol of a contender, and plain PyTorch training with SGD or AdamW.

Enters: a model of the contender's own, a loss, a batch. Learning rates are so small that the model stays
where it is, so that all contenders do the same arithmetic throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, final

import torch
from torch import Tensor, nn

from kfac_fx.batch import call_model, default_loss
from kfac_fx.graph import tree_leaves
from kfac_fx.types import LossFn

LEARNING_RATE = 1e-6
Data: TypeAlias = tuple[LossFn | None, Any, Any]  # loss, inputs, targets
FIRST_ORDER: Mapping[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE),
}


class Contender(Protocol):
    """A training step that can be run as any step of its schedule."""

    @property
    def every(self) -> tuple[int, int] | None:
        """Steps between statistics, and between refreshes; None without any."""
        ...

    @property
    def kinds(self) -> Mapping[str, Sequence[int]]:
        """The steps of one period by kind, as `kinds_of` gives them."""
        ...

    def run(self, index: int) -> None:
        """One training step, as number `index` of the schedule."""
        ...

    def parts(self) -> Mapping[str, Callable[[], Any]]:
        """Parts of a step that run by themselves, as `phases_of` reads them; empty if there are none."""
        ...

    def tensors(self) -> Iterable[Tensor] | None:
        """What is held between steps; None if that is not known."""
        ...


def kinds_of(due: Callable[[int], tuple[bool, bool]], period: int) -> dict[str, tuple[int, ...]]:
    """Steps of one period by kind. due: whether step number i has statistics, and whether a refresh."""
    names = {
        (False, False): "plain",
        (True, False): "statistics",
        (True, True): "refresh",
        (False, True): "refresh alone",
    }
    found: dict[str, list[int]] = {name: [] for name in names.values()}
    for index in range(period):
        found[names[due(index)]].append(index)
    return {name: tuple(steps) for name, steps in found.items() if steps}


@final
class FirstOrder:
    """Forward, `backward()`, the optimizer's step. mode: of torch.compile for the loss; None: eager."""

    every: tuple[int, int] | None = None
    kinds: Mapping[str, Sequence[int]] = {"plain": (0,)}

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        *,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        mode: str | None,
    ) -> None:
        self._model = model
        self._batch = data[1:]
        self._optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
        loss = training_loss(model, data[0])
        self._loss: Callable[[Any, Any], Tensor] = (
            loss if mode is None else torch.compile(loss, dynamic=False, mode=mode)
        )
        self.run(0)

    def run(self, index: int) -> None:
        """One step."""
        self._gradients()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _gradients(self) -> None:
        self._optimizer.zero_grad()
        self._loss(*self._batch).backward()

    def parts(self) -> Mapping[str, Callable[[], Any]]:
        """Forward and backward; the update."""
        self._gradients()
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        gradients = [(p, None if p.grad is None else p.grad.clone()) for p in held]  # CUDA graphs reuse them

        def update() -> None:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            self._optimizer.step()

        return {"gradients": self._gradients, "update": update}

    def tensors(self) -> Iterable[Tensor]:
        """The model's, and the optimizer's state."""
        return model_tensors(self._model, self._optimizer)


def training_loss(model: nn.Module, loss_fn: LossFn | None) -> Callable[[Any, Any], Tensor]:
    """The loss of inputs and targets."""
    return lambda inputs, targets: (loss_fn or default_loss)(call_model(model, inputs), targets)


def model_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters, buffers and the optimizer's state."""
    state = [leaf for leaf in tree_leaves(dict(optimizer.state)) if isinstance(leaf, Tensor)]
    return [*model.parameters(), *model.buffers(), *state]
