"""The quadratic model M(d) = 1/2 d^T (F + (lambda + eta) I) d + grad h . d in the span of a few directions.

Martens & Grosse 2015, sections 6.4 and 7 (arXiv:1503.05671); methods.md 2.6. F is the generalised
Gauss-Newton matrix of the recorded losses (their Fisher): u^T F v = R_ sum (S^T J u) . (S^T J v), so that one
derivative per direction is enough and no matrix is formed. Enters: derivatives and directions by parameter
name. Leaves: the model's matrix and its minimiser. Knows no graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_fx.forward import Derivative, Vector


def gram(derivatives: Sequence[Derivative], directions: Sequence[Vector], *, damping: float) -> Tensor:
    """D^T (F + damping I) D of K directions: [K, K] in float64.

    damping: lambda + eta, in units of the Hessian of the loss.
    """
    places = range(len(directions))
    entries: dict[tuple[int, int], Tensor] = {}
    for i, j in ((i, j) for i in places for j in places if j <= i):
        one, other = derivatives[i], derivatives[j]
        products = [
            (a * b * scale).sum(dtype=torch.float64)
            for a, b, scale in zip(one.roots, other.roots, one.scales, strict=True)
        ]
        entries[i, j] = entries[j, i] = torch.stack(products).sum() + damping * dot(
            directions[i], directions[j]
        )
    return torch.stack([torch.stack([entries[i, j] for j in places]) for i in places])


def minimiser(curvature: Tensor, slopes: Tensor, *, precision: float) -> Tensor:
    """Coefficients c that minimise 1/2 c^T curvature c + slopes . c: [K].

    curvature: [K, K], symmetric, positive semi-definite. Directions without curvature, and what remains of
    several after all but `precision` of them is parallel, get none: the solution is the shortest one after
    scaling each direction to unit curvature. precision: relative error of the entries.
    """
    diagonal = curvature.diagonal()
    usable = diagonal > 0
    unit = torch.where(usable, 1 / torch.where(usable, diagonal, 1.0).sqrt(), 0.0)
    values, vectors = torch.linalg.eigh(unit[:, None] * curvature * unit)
    kept = values > 16 * precision * len(values)
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    return -unit * (vectors @ (inverse * (vectors.mT @ (unit * slopes))))


def dot(left: Vector, right: Vector) -> Tensor:
    """Sum of products over the parameters that both have: 0-dim, float64."""
    names = [name for name in left if name in right]
    products = [(_real(left[name]) * _real(right[name])).sum(dtype=torch.float64) for name in names]
    return torch.stack(products).sum() if products else torch.zeros((), dtype=torch.float64)


def combination(coefficients: Sequence[float], directions: Sequence[Vector]) -> dict[str, Tensor]:
    """Sum of coefficient times direction, for the parameters that any direction has."""
    total: dict[str, Tensor] = {}
    for coefficient, direction in zip(coefficients, directions, strict=True):
        for name, tensor in direction.items():
            term = coefficient * tensor
            total[name] = total[name] + term if name in total else term
    return total


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
