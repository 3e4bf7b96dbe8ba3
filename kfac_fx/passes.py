"""The backward passes of one training step, run while it is traced: the loss' own and those of the Fisher.

Enters: the loss, the recorded loss calls and the trainable leaves. Leaves: one flat tuple of tensors, and in
`Trace` what
each of them is. Tensors only; no graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from kfac_fx.batch import Batch, num_examples
from kfac_fx.errors import LossError
from kfac_fx.hessian import num_root_cotangents, root_cotangents, sampled_cotangent, scaled_terms
from kfac_fx.loss import LossCall
from kfac_fx.types import Fisher

MAX_TYPE2_PASSES = 256


@final
@dataclass(kw_only=True)
class Trace:
    """What the traced function learns while it runs: positions in its output list, filled once.

    losses, gradients: of each backward pass, the calls where it starts (none: at the loss itself) and the
    parameters it reaches.
    """

    losses: list[tuple[int, ...]] = field(default_factory=list)
    gradients: list[tuple[str, ...]] = field(default_factory=list)
    calls: list[LossCall] = field(default_factory=list)
    weighted: list[bool] = field(default_factory=list)


def backward_passes(
    loss: Tensor,
    leaves: dict[str, Tensor],
    calls: list[LossCall],
    fisher: Fisher,
    batch: Batch,
    trace: Trace,
) -> tuple[Tensor, ...]:
    """loss, 1/R_; of each call its loss, prediction, 1/R_ and, if `trace.weighted`, the weights of its terms;
    then per pass its seeds and its gradients. Called while tracing.
    """
    slopes = _slopes(loss, calls)
    with torch.no_grad():  # before the backward, so that statistics need not wait for its end
        scaled = [scaled_terms(call, slope) for call, slope in slopes]
        inverse = _inverse_scale([pair[0] for pair in scaled], loss, batch)
    seed = torch.ones_like(loss)
    outputs = [seed, *_gradients([loss], [seed], leaves, trace)]
    trace.losses.append(())
    trace.calls = [call for call, _ in slopes]
    trace.weighted = [weights is not None for _, weights in scaled]
    if fisher != "empirical" and trace.calls:  # without calls `make_capture` refuses
        _check_passes(trace.calls, fisher)
        for numbers, seeds in _fisher_seeds(trace.calls, scaled, inverse, fisher):
            predictions = [trace.calls[number].prediction for number in numbers]
            outputs += [*seeds, *_gradients(predictions, seeds, leaves, trace)]
            trace.losses.append(numbers)
    described: list[Tensor] = []
    for call, (own, weights) in zip(trace.calls, scaled, strict=True):
        described += [call.loss, call.prediction, own, *([] if weights is None else [weights])]
    return (loss, inverse, *described, *outputs)


def _gradients(
    outputs: list[Tensor], seeds: list[Tensor], leaves: dict[str, Tensor], trace: Trace
) -> list[Tensor]:
    found = torch.autograd.grad(outputs, list(leaves.values()), seeds, retain_graph=True, allow_unused=True)
    present = {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}
    trace.gradients.append(tuple(present))
    return list(present.values())


def _slopes(loss: Tensor, calls: list[LossCall]) -> list[tuple[LossCall, Tensor]]:
    """Derivative of the final loss with respect to each recorded call.

    Calls that the loss ignores are dropped.
    """
    used = []
    for call in calls:
        if not call.loss.requires_grad or not call.prediction.requires_grad:
            continue
        (slope,) = torch.autograd.grad(loss, [call.loss], retain_graph=True, allow_unused=True)
        if slope is not None:
            used.append((call, slope.detach()))
    return used


def _inverse_scale(inverses: list[Tensor], loss: Tensor, batch: Batch) -> Tensor:
    """1/R_ of the whole loss; of an unknown loss N, as for a mean over the batch."""
    if inverses:
        wide = [value.to(torch.promote_types(loss.dtype, torch.float32)) for value in inverses]
        return wide[0] if len(wide) == 1 else _finite_mean(torch.stack(wide))
    size = float(num_examples(batch))
    return torch.full((), size, dtype=torch.promote_types(loss.dtype, torch.float32), device=loss.device)


def _finite_mean(values: Tensor) -> Tensor:
    """A loss that enters with weight zero has R_ = 0: it says nothing about the others' scale."""
    finite = torch.isfinite(values)
    return torch.where(finite, values, 0.0).sum() / finite.sum()


def _fisher_seeds(
    calls: list[LossCall], scaled: list[tuple[Tensor, Tensor | None]], inverse: Tensor, fisher: Fisher
) -> Iterator[tuple[tuple[int, ...], list[Tensor]]]:
    """Per pass the calls at whose predictions it starts, and the cotangent of each.

    They are scaled so that G is `inverse * sum g g^T`, as for the training pass. The Hessian of a sum of
    losses is the sum of theirs: draws of different calls are independent with mean zero, so that one pass
    from all of them has it as its mean, and columns of different calls go in passes of their own.
    """
    scales = [1.0 / (inverse * own).sqrt() for own, _ in scaled]
    weights = [term_weights for _, term_weights in scaled]
    if fisher == "mc":
        seeds = []
        for call, weight, scale in zip(calls, weights, scales, strict=True):
            cotangent = sampled_cotangent(call, weight)
            seeds.append(cotangent * scale.to(cotangent.dtype))
        yield tuple(range(len(calls))), seeds
        return
    for number, (call, weight, scale) in enumerate(zip(calls, weights, scales, strict=True)):
        for cotangent in root_cotangents(call, weight, scale):
            yield (number,), [cotangent]


def _check_passes(calls: list[LossCall], fisher: Fisher) -> None:
    if fisher != "type2":
        return
    needed = sum(num_root_cotangents(call) for call in calls)
    if needed > MAX_TYPE2_PASSES:
        raise LossError(
            f"fisher='type2' needs one backward pass per loss term and class of an example, here {needed}, "
            f"more than {MAX_TYPE2_PASSES}. fisher='mc' needs one and has the same mean."
        )


def check_loss(loss: Any) -> None:
    """Raise `LossError` unless the loss is a differentiable scalar tensor."""
    if not isinstance(loss, Tensor):
        raise LossError(f"the loss must be a tensor, but loss_fn returned {type(loss).__name__}.")
    if loss.dim() != 0:
        remedy = "Reduce it, for example with .mean()."
        raise LossError(f"the loss must be a scalar, but it has shape {tuple(loss.shape)}. {remedy}")
    if not loss.requires_grad:
        raise LossError(
            "the loss does not depend on any trainable parameter: check requires_grad and .detach()."
        )
