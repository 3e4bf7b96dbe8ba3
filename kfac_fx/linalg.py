"""Inverses and traces of symmetric factors: batched tensors in, tensors out. Knows no layers and no methods.

What goes through eigenvectors is in `spectrum`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kfac_fx import host

_LARGE = 1024**2  # entries of a matrix


@final
@dataclass(frozen=True, kw_only=True)
class Inverses:
    """Inverses of a list of batches, and how many matrices were retried in float64, then with ten times the
    damping, or kept their last inverse.
    """

    inverses: list[Tensor]
    retried: int
    kept_last: int | Tensor
    raised: int = 0


def damped_inverses(
    factors: Sequence[Tensor], dampings: Sequence[Tensor], *, last: Sequence[Tensor]
) -> Inverses:
    """Inverse of `factor + damping I` by Cholesky; matrices of one size are one batched call.

    factors: each [batch, d, d], symmetric, positive semi-definite. dampings: each [batch], in the factor's
    units. A matrix that is not positive definite in its own precision is retried in float64, then with ten
    times its damping; if that fails too, or if it is not finite, its inverse in `last` is kept. methods.md
    1.7. One host read per size, none per matrix, while nothing fails. Where `host.may_read` forbids that,
    nothing is retried: a matrix that is not positive definite keeps its last inverse.
    """
    inverses: list[Tensor] = list(last)
    retried = raised = 0
    kept: int | Tensor = 0
    for indices in alike(factors):
        stacked = torch.cat([factors[i] for i in indices])
        damping = torch.cat([dampings[i].to(stacked.dtype) for i in indices])
        result, counts = _inverse_with_retries(stacked, damping, torch.cat([last[i] for i in indices]))
        retried, raised, kept = retried + counts[0], raised + counts[1], kept + counts[2]
        for i, piece in zip(indices, result.split([factors[i].shape[0] for i in indices]), strict=True):
            inverses[i] = piece
    return Inverses(inverses=inverses, retried=retried, kept_last=kept, raised=raised)


def alike(factors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of batches of matrices of one size, dtype and device: each is one batched call.

    Large ones of a CPU are by themselves: torch takes a batch one by one there, and to stack it takes time.
    """
    order: dict[tuple[torch.Size, torch.dtype, torch.device, int | None], list[int]] = {}
    for index, factor in enumerate(factors):
        apart = factor.device.type == "cpu" and factor.shape[1:].numel() >= _LARGE
        kind = (factor.shape[1:], factor.dtype, factor.device, index if apart else None)
        order.setdefault(kind, []).append(index)
    yield from order.values()


def add_diagonal(factor: Tensor, damping: Tensor) -> Tensor:
    """Factor + damping I. factor: [batch, d, d]; damping: [batch]."""
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return factor + damping.to(factor.dtype)[:, None, None] * eye


def _inverse_with_retries(
    matrices: Tensor, damping: Tensor, last: Tensor
) -> tuple[Tensor, tuple[int, int, int | Tensor]]:
    """Inverses, and how many were retried in float64, retried with ten times the damping, or kept."""
    damped = add_diagonal(matrices, damping)
    finite = torch.isfinite(damped).flatten(1).all(1)
    inverse, failed = _cholesky_inverse(damped, finite)
    if not host.may_read(matrices.device):
        return torch.where(failed[:, None, None], last, inverse), (0, 0, failed.sum())
    if not bool(failed.any()):
        return inverse, (0, 0, 0)
    again = failed.nonzero().squeeze(1)
    finite = finite[again]
    wide = matrices[again].double()
    found, failed = _cholesky_inverse(add_diagonal(wide, damping[again]), finite)
    raised, still_failed = _cholesky_inverse(add_diagonal(wide, 10 * damping[again]), finite)
    found = torch.where(failed[:, None, None], raised, found).to(matrices.dtype)
    kept = failed & still_failed
    replacement = torch.where(kept[:, None, None], last[again], found)
    counts = len(again), int((failed & finite).sum()), int(kept.sum())
    return inverse.index_copy(0, again, replacement), counts


def _cholesky_inverse(matrices: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    """(inverse, failed) per matrix.

    Matrices that are not finite are not decomposed (LAPACK may loop on NaN).
    """
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    safe = torch.where(finite[:, None, None], matrices, eye)
    root, info = torch.linalg.cholesky_ex(safe)
    inverse = torch.cholesky_inverse(torch.where((info == 0)[:, None, None], root, eye))
    failed = ~finite | (info != 0) | ~torch.isfinite(inverse).flatten(1).all(1)
    return inverse, failed


def small_inverse(blocks: Tensor, damping: float | Tensor) -> Tensor:
    """Inverse of `block + damping I` in closed form. blocks: [channels, k, k] with k = 1 or 2, positive
    semi-definite. damping: a number, or one per channel.

    A block that stays singular (damping 0) gives zeros: no step in a direction without curvature.
    """
    damping = number(damping, like=blocks)
    if blocks.shape[-1] == 1:
        damped = blocks + damping.reshape(-1, 1, 1)
        return (1 / damped).masked_fill(~(damped > 0), 0.0)
    a, b, d = blocks[:, 0, 0] + damping, blocks[:, 0, 1], blocks[:, 1, 1] + damping
    determinant = a * d - b * b
    # The product loses the determinant to cancellation when the block is nearly singular: bound it from
    # below.
    safe = torch.maximum(determinant, torch.finfo(a.dtype).eps * a * d)
    adjugate = torch.stack([torch.stack([d, -b], -1), torch.stack([-b, a], -1)], -2)
    return (adjugate / safe[:, None, None]).masked_fill(~(safe > 0)[:, None, None], 0.0)


def number(value: float | Tensor, *, like: Tensor) -> Tensor:
    """A number as a 0-dim tensor, or a tensor, of this one's dtype and on its device, without a copy from the
    host.
    """
    return value.to(like) if isinstance(value, Tensor) else like.new_full((), value)


def mean_eigenvalue(factor: Tensor) -> Tensor:
    """Trace / d per matrix. factor: [batch, d, d], or [d] for a diagonal one (returns [1])."""
    if factor.dim() == 1:
        return factor.mean().reshape(1)
    return factor.diagonal(dim1=-2, dim2=-1).mean(-1)


def pi_ratio(a_mean: Tensor, g_mean: Tensor) -> Tensor:
    """Pi = sqrt(mean eigenvalue of A / mean eigenvalue of G); 1 where either is zero or not finite.

    Martens & Grosse 2015, section 6.3 (arXiv:1503.05671); guards of methods.md 1.6 and pitfall P12.
    """
    ratio = torch.sqrt(a_mean / g_mean)
    usable = (a_mean > 0) & (g_mean > 0) & torch.isfinite(ratio) & (ratio > 0)
    return torch.where(usable, ratio, torch.ones_like(ratio))


def join_orientations(a: Tensor, g: Tensor, a_swapped: Tensor, g_swapped: Tensor) -> tuple[Tensor, Tensor]:
    """One Kronecker product for a weight used in both orientations: partial traces of the sum of its two
    blocks.

    a, g_swapped: factors of the input side, [1, d_in, d_in] or [d_in]; g, a_swapped: of the output side, [1,
    d_out, d_out]. in = a tr(g) + g_swapped tr(a_swapped); out = (g tr(a) + a_swapped tr(g_swapped)) / sum of
    both traces' products. The trace of the sum is kept. Embedding and head, tied autoencoders (methods.md
    9.4).
    """
    trace_a, trace_g, trace_as, trace_gs = (_trace(factor) for factor in (a, g, a_swapped, g_swapped))
    total = trace_a * trace_g + trace_as * trace_gs
    inner = a * trace_g + g_swapped * trace_as
    outer = (g * trace_a + a_swapped * trace_gs) / total.clamp(min=torch.finfo(total.dtype).tiny)
    return inner, outer


def _trace(factor: Tensor) -> Tensor:
    return factor.sum() if factor.dim() == 1 else factor.diagonal(dim1=-2, dim2=-1).sum()
