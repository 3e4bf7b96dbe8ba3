"""What one entry of the zoo is: a model, its loss and one batch.

Factories enter, seeded factories leave. Nothing here imports the library under test, and nothing here keeps
state: each call of a factory builds a new model from the same seed.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SEED = 0

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
LossFunction = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Example:
    """A model with one batch; `loss_fn` is None when the model's own output carries `.loss`."""

    model: nn.Module
    loss_fn: LossFunction | None
    inputs: Inputs
    targets: Tensor | None


Factory = Callable[[], Example]


def seeded(factory: Factory) -> Factory:
    """The same factory, drawing weights and batch from a fixed seed and leaving the caller's stream alone."""

    @wraps(factory)
    def build() -> Example:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return factory()

    return build


def by_name(*factories: Factory) -> dict[str, Factory]:
    """Factories keyed by their function's name, each seeded."""
    return {factory.__name__: seeded(factory) for factory in factories}


def to(example: Example, dtype: torch.dtype) -> Example:
    """A copy of the example whose model, floating inputs and floating targets have type `dtype`."""
    return replace(
        example,
        model=copy.deepcopy(example.model).to(dtype),
        inputs=_cast(example.inputs, dtype),
        targets=_cast(example.targets, dtype),
    )


def loss(example: Example) -> Tensor:
    """The scalar loss of the example's batch, computed by plain PyTorch."""
    if isinstance(example.inputs, dict):
        outputs = example.model(**example.inputs)
    elif isinstance(example.inputs, tuple):
        outputs = example.model(*example.inputs)
    else:
        outputs = example.model(example.inputs)
    return outputs.loss if example.loss_fn is None else example.loss_fn(outputs, example.targets)


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over every token; logits: [batch, time, vocabulary], targets: [batch, time]."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def classes(*shape: int, count: int) -> Tensor:
    """Random class labels, or tokens, below `count`."""
    return torch.randint(count, shape)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value
