"""Losses with a known Hessian: which was called, and its scale R_ (methods.md 1.1).

Enters: calls of torch's loss functions, recorded while the model's loss runs. Leaves: for each call the
prediction f, the weight of each term and what the mean divides by. Tensors only; no graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Kind = Literal["cross_entropy", "mse", "bce"]


@final
@dataclass(frozen=True, kw_only=True)
class LossCall:
    """One call of a known loss: `loss = sum over terms of term_weight * ell(prediction)` before reduction.

    prediction: the tensor the loss read. class_dim: its class axis. total: sum of the term weights if the
    reduction is "mean", else 1 (so that R_ = factor / total). factor: 2 for squared error (ell = 1/2 |f -
    y|^2), else 1. term_weight: broadcastable to the prediction without its class axis, or None for all ones.
    """

    kind: Kind
    reduction: str
    prediction: Tensor
    loss: Tensor
    class_dim: int
    term_weight: Tensor | None
    total: Tensor
    factor: float

    @property
    def can_ignore(self) -> bool:
        """Whether terms with weight zero are ignored targets."""
        return self.kind == "cross_entropy" and self.term_weight is not None

    @property
    def num_terms(self) -> int:
        """Number of loss terms.

        Positions of the prediction that have a class (or feature) vector of their own.
        """
        return self.prediction.numel() // max(self.num_classes, 1)

    @property
    def num_classes(self) -> int:
        """Length of one prediction vector."""
        return self.prediction.shape[self.class_dim]


@final
class LossRecorder(TorchFunctionMode):
    """While active, lists every call of a loss whose Hessian is known."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[LossCall] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the function; describe it if it is a known loss."""
        out = func(*args, **(kwargs or {}))
        describe = _DESCRIBE.get(func)
        if describe is not None:
            with torch.no_grad():
                self.calls.append(describe(out, *args, **(kwargs or {})))
        return out


def _cross_entropy(
    out: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> LossCall:
    class_dim = 0 if input.dim() == 1 else 1
    num_classes = input.shape[class_dim]
    if target.shape == input.shape and target.is_floating_point():  # class probabilities
        weights = torch.ones_like(target) if weight is None else weight.reshape(-1, *[1] * (input.dim() - 2))
        per_term = (target * weights).sum(class_dim)
        total = torch.full((), float(per_term.numel()), dtype=input.dtype, device=input.device)
    else:
        kept = (target != ignore_index).to(input.dtype)
        per_class = (
            torch.ones(num_classes, dtype=input.dtype, device=input.device) if weight is None else weight
        )
        of_label = (
            kept if weight is None else kept * per_class[torch.where(target == ignore_index, 0, target)]
        )
        total = of_label.sum()
        smooth = label_smoothing / num_classes * per_class.sum() * kept
        per_term = of_label if label_smoothing == 0 else (1 - label_smoothing) * of_label + smooth
    return _call("cross_entropy", out, input, class_dim, per_term, total, 1.0, reduction)


def _nll(
    out: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> LossCall:
    return _cross_entropy(out, input, target, weight, size_average, ignore_index, reduce, reduction)


def _mse(
    out: Tensor,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> LossCall:
    input = input if input.requires_grad or not target.requires_grad else target  # symmetric in its arguments
    total = torch.full((), float(input.numel()), dtype=input.dtype, device=input.device)
    per_term = None
    if weight is not None:
        per_term = weight.expand_as(input)
        total = per_term.sum()
    return _call("mse", out, input, input.dim() - 1, per_term, total, 2.0, reduction)


def _bce(
    out: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> LossCall:
    total = torch.full((), float(input.numel()), dtype=input.dtype, device=input.device)
    per_term = None
    if weight is not None or pos_weight is not None:
        per_term = torch.ones_like(input) if weight is None else weight.expand_as(input)
        if pos_weight is not None:
            per_term = per_term * (1 + (pos_weight - 1) * target)
    return _call("bce", out, input, input.dim() - 1, per_term, total, 1.0, reduction)


def _call(
    kind: Kind,
    out: Tensor,
    prediction: Tensor,
    class_dim: int,
    per_term: Tensor | None,
    total: Tensor,
    factor: float,
    reduction: str,
) -> LossCall:
    if reduction != "mean":
        total = torch.ones_like(total)
    return LossCall(
        kind=kind,
        reduction=reduction,
        prediction=prediction,
        loss=out,
        class_dim=class_dim,
        term_weight=per_term,
        total=total,
        factor=factor,
    )


_DESCRIBE: dict[Callable[..., Any], Callable[..., LossCall]] = {
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _nll,
    F.mse_loss: _mse,
    F.binary_cross_entropy_with_logits: _bce,
}
