"""Hessians of the known losses: their roots, and the cotangents of a Fisher (methods.md 1.1, 1.2).

Enters: recorded losses (`loss.LossCall`). Leaves: what to send back from the prediction f. Tensors only; no
graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_fx.loss import Kind, LossCall


def scaled_terms(call: LossCall, slope: Tensor) -> tuple[Tensor, Tensor | None]:
    """(1/R_, term weights) of a call whose result enters the final loss with derivative `slope`.

    slope: 0-dim for reductions "mean" and "sum"; of the call's shape for "none". Terms that the loss ignores
    weigh 0.
    """
    if slope.dim() == 0:
        return call.total / (call.factor * slope), call.term_weight
    weights = slope if call.term_weight is None else slope * call.term_weight
    mean_weight = weights.sum() / (weights != 0).sum().clamp(min=1)
    return 1.0 / (call.factor * mean_weight), weights / mean_weight


def _drawable(p: Tensor) -> Tensor:
    """Probabilities that torch draws from, also where a prediction is not finite: the loss tells of that."""
    return p.nan_to_num(nan=1.0)


def sampled_cotangent(call: LossCall, weights: Tensor | None) -> Tensor:
    """D ell(f, y^)/df with y^ drawn from the model's own prediction: E[g g^T] is the Hessian (type-1, MC)."""
    f = call.prediction.detach()
    if call.kind == "mse":
        cotangent = torch.randn_like(f)
    elif call.kind == "bce":
        q = torch.sigmoid(f)
        cotangent = q - torch.bernoulli(_drawable(q))
    else:
        logits = f.movedim(call.class_dim, -1)
        p = torch.softmax(logits, -1)
        drawn = torch.multinomial(_drawable(p).reshape(-1, p.shape[-1]), 1).reshape(p.shape[:-1])
        cotangent = (p - F.one_hot(drawn, p.shape[-1]).to(p.dtype)).movedim(-1, call.class_dim)
    return _weighted(call, cotangent, weights)


def root_cotangents(call: LossCall, weights: Tensor | None, scale: Tensor) -> Iterator[Tensor]:
    """Columns of a root S of the Hessian, S S^T = H, times `scale`.

    One cotangent per loss term of an example and class (type-2).
    """
    f = call.prediction.detach()
    positions = f.movedim(call.class_dim, -1)
    root = _root(call.kind, positions)
    weight = scale if weights is None else scale * _per_class(call, weights, f).movedim(call.class_dim, -1)
    inner = positions.shape[1:-1]
    for position in range(math.prod(inner)):
        mask = (torch.arange(math.prod(inner), device=f.device) == position).to(f.dtype)
        for c in range(call.num_classes):
            column = root(c) * weight.to(f.dtype)
            if math.prod(inner) > 1:
                column = column * mask.reshape(*inner, 1)
            yield column.movedim(-1, call.class_dim)


def root_products(kind: Kind, class_dim: int, prediction: Tensor, tangent: Tensor) -> Tensor:
    """S^T t at every position, classes last: H's inner product of two tangents is that of their results."""
    f, t = prediction.movedim(class_dim, -1), tangent.movedim(class_dim, -1)
    if kind == "mse":
        return t
    if kind == "bce":
        q = torch.sigmoid(f)
        return torch.sqrt(q * (1 - q)) * t
    p = torch.softmax(f, -1)
    return torch.sqrt(p) * (t - (p * t).sum(-1, keepdim=True))


def num_root_cotangents(call: LossCall) -> int:
    """How many backward passes `root_cotangents` needs."""
    f = call.prediction
    return math.prod(f.shape[1:]) if f.dim() > 1 else f.numel()


def _root(kind: Kind, f: Tensor) -> Callable[[int], Tensor]:
    """Column c of S at every position (methods.md 1.2). f: [..., C]."""
    eye = torch.eye(f.shape[-1], dtype=f.dtype, device=f.device)
    if kind == "mse":
        return lambda c: eye[c].expand_as(f)
    if kind == "bce":
        q = torch.sigmoid(f)
        deviation = torch.sqrt(q * (1 - q))
        return lambda c: eye[c] * deviation
    p = torch.softmax(f, -1)
    root = torch.sqrt(p)
    return lambda c: root[..., c : c + 1] * (eye[c] - p)


def _per_class(call: LossCall, weights: Tensor, f: Tensor) -> Tensor:
    """Roots of the term weights, broadcastable to the prediction."""
    root = weights.sqrt()
    return root if root.shape == f.shape else root.unsqueeze(call.class_dim)


def _weighted(call: LossCall, cotangent: Tensor, weights: Tensor | None) -> Tensor:
    return cotangent if weights is None else cotangent * _per_class(call, weights, cotangent)
