"""A batch as a flat list of tensors plus its structure, and the conventions for calling a model and a
default loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from kfac_fx.errors import LossError
from kfac_fx.graph import tree_flatten, tree_leaves, tree_unflatten


@final
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Inputs and targets as a flat list of tensors, and the rest (structure, plain numbers) as a constant."""

    tensors: tuple[Tensor, ...]
    num_inputs: int
    rest: tuple[Any, ...]
    spec: Any

    def rebuild(self, tensors: tuple[Tensor, ...]) -> tuple[Any, Any]:
        """(inputs, targets) with these tensors in the places of the batch's own."""
        source = iter(tensors)
        leaves = [next(source) if leaf is _TENSOR else leaf for leaf in self.rest]
        inputs, targets = tree_unflatten(leaves, self.spec)
        return inputs, targets


class _TensorMark:
    def __repr__(self) -> str:
        return "tensor"


_TENSOR = _TensorMark()


def flatten_batch(inputs: Any, targets: Any) -> Batch:
    """Separate the tensors of a batch from its structure."""
    leaves, spec = tree_flatten((inputs, targets))
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
    rest = tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    num_inputs = sum(isinstance(leaf, Tensor) for leaf in tree_leaves(inputs))
    return Batch(tensors=tensors, num_inputs=num_inputs, rest=rest, spec=spec)


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """A tensor is one positional argument, a tuple several, a dict keywords."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def default_loss(outputs: Any, targets: Any) -> Tensor:
    """The loss when none is given.

    The model's own, else cross-entropy or mean squared error by the targets' type.
    """
    if isinstance(outputs, Mapping) and outputs.get("loss") is not None:
        return outputs["loss"]
    own = getattr(outputs, "loss", None)
    if not isinstance(outputs, Tensor) and isinstance(own, Tensor):
        return own
    if targets is None:
        return _own_loss(outputs)
    if isinstance(outputs, Tensor) and isinstance(targets, Tensor):
        if not targets.is_floating_point() and outputs.is_floating_point():
            return nn.functional.cross_entropy(outputs, targets)
        if targets.shape == outputs.shape:
            return nn.functional.mse_loss(outputs, targets)
    raise LossError(
        "loss_fn=None: the model's output is neither a loss nor carries .loss, and the targets fit neither "
        "cross-entropy (integer targets) nor mean squared error (targets of the output's shape). "
        "Pass loss_fn."
    )


def _own_loss(outputs: Any) -> Tensor:
    """The model's output, where there are neither a loss function nor targets: it must be a scalar."""
    if isinstance(outputs, Tensor) and outputs.dim() == 0:
        return outputs
    what = f"of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
    raise LossError(
        "loss_fn and targets are None, so the model's output is taken as the loss, and it is no scalar and "
        f"carries no .loss ({what}). Pass a loss_fn or targets."
    )


def num_examples(batch: Batch) -> int:
    """N: the leading dimension of the first input.

    Unless the targets lead with another size that stands later in that input (time-major sequences).
    """
    inputs = [t for t in batch.tensors[: batch.num_inputs] if t.dim() > 0]
    targets = [t for t in batch.tensors[batch.num_inputs :] if t.dim() > 0]
    if not inputs:
        return int(targets[0].shape[0]) if targets else 1
    leading = int(inputs[0].shape[0])
    if targets and targets[0].shape[0] != leading and targets[0].shape[0] in inputs[0].shape[1:-1]:
        return int(targets[0].shape[0])
    return max(leading, 1)
