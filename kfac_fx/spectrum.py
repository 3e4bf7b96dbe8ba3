"""Eigenvectors of symmetric factors, in float64, and what needs them: pseudo-inverse, Kronecker sums.

Batched tensors in, tensors out. Matrices that are not finite, or that LAPACK gives up, keep the last result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kfac_fx import host
from kfac_fx.linalg import Inverses, alike

_SQUARINGS = 25


@final
@dataclass(frozen=True, kw_only=True)
class Eigen:
    """Of a list of batches: orthogonal bases [batch, d, d] (eigenvectors as columns), eigenvalues [batch, d],
    and how many matrices kept their last basis.
    """

    bases: list[Tensor]
    values: list[Tensor]
    kept_last: int | Tensor


def pseudo_inverses(factors: Sequence[Tensor], *, last: Sequence[Tensor]) -> Inverses:
    """Pseudo-inverse of each factor without damping, through its eigenvectors in float64.

    Eigenvalues below 1e-10 of the largest (and below the rounding of the factor's own dtype) count as zero:
    no step in a direction without curvature. Arguments as in `damped_inverses`.
    """
    inverses: list[Tensor] = list(last)
    kept: int | Tensor = 0
    for indices in alike(factors):
        matrices, old = (torch.cat([part[i] for i in indices]) for part in (factors, last))
        basis, failed = _eigenvectors(matrices.double())
        values = ((matrices.double() @ basis) * basis).sum(-2)
        usable = values > _cutoff(matrices) * values.amax(-1, keepdim=True)
        reciprocal = (1 / values.masked_fill(~usable, 1.0)).masked_fill(~usable, 0.0)
        found = ((basis * reciprocal.unsqueeze(-2)) @ basis.mT).to(matrices.dtype)
        found = torch.where(failed[:, None, None], old, found)
        kept = kept + failed.sum()
        for i, piece in zip(indices, found.split([factors[i].shape[0] for i in indices]), strict=True):
            inverses[i] = piece
    return Inverses(inverses=inverses, retried=0, kept_last=kept)


def eigendecompositions(factors: Sequence[Tensor], *, last: Sequence[Tensor]) -> Eigen:
    """Eigenvectors and eigenvalues in float64; matrices of one size are one batched call.

    factors: each [batch, d, d], symmetric, positive semi-definite; symmetrised, and eigenvalues below zero
    are zero (methods.md 1.7, pitfall P4). last: bases to keep for a matrix that is not finite or that LAPACK
    gives up; its eigenvalues are then diag(Q^T M Q) in that basis, NaN if it is not finite.
    """
    bases: list[Tensor] = [basis.double() for basis in last]
    values: list[Tensor] = [factor.new_zeros(0) for factor in factors]
    kept: int | Tensor = 0
    for indices in alike(factors):
        matrices = torch.cat([factors[i] for i in indices]).double()
        basis, failed = _eigenvectors(matrices)
        basis = _with_settled_null_space(matrices, basis, _cutoff(factors[indices[0]]))
        basis = torch.where(failed[:, None, None], torch.cat([bases[i] for i in indices]), basis)
        found = ((matrices @ basis) * basis).sum(-2)
        found = found.clamp(min=0).masked_fill(~torch.isfinite(found).all(-1, keepdim=True), torch.nan)
        kept = kept + failed.sum()
        sizes = [factors[i].shape[0] for i in indices]
        for i, q, eigenvalues in zip(indices, basis.split(sizes), found.split(sizes), strict=True):
            bases[i], values[i] = q, eigenvalues
    return Eigen(bases=bases, values=values, kept_last=kept)


def _eigenvectors(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """(eigenvectors, failed) per matrix.

    Matrices that are not finite are not decomposed (LAPACK may loop on NaN); one that does not converge does
    not stop the others.
    """
    finite = torch.isfinite(matrices).flatten(1).all(1)
    safe = ((matrices + matrices.mT) / 2).masked_fill(~finite[:, None, None], 0.0)
    try:
        vectors = torch.linalg.eigh(safe).eigenvectors
    except torch.linalg.LinAlgError:  # type: ignore[reportPrivateImportUsage]
        if len(matrices) == 1:
            return safe, torch.ones_like(finite)
        pieces = [_eigenvectors(matrix.unsqueeze(0)) for matrix in matrices]
        vectors, failed = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return vectors, failed
    return vectors, ~finite | ~torch.isfinite(vectors).flatten(1).all(1)


def _cutoff(factor: Tensor) -> float:
    """Share of the largest eigenvalue below which one counts as zero: 1e-10, or the dtype's rounding."""
    return max(1e-10, factor.shape[-1] * torch.finfo(factor.dtype).eps)


def _with_settled_null_space(matrices: Tensor, basis: Tensor, cutoff: float) -> Tensor:
    """The same eigenvectors, but in a null space (below `cutoff` of the largest) those of diag(1 .. d) there.

    Any basis of a null space is right, so that rounding would choose it; what is measured later in that basis
    (EKFAC's S) would then differ between two ways to sum one batch.
    """
    values = ((matrices @ basis) * basis).sum(-2)
    null = values <= cutoff * values.amax(-1, keepdim=True)
    if not bool((null.sum(-1) > 1).any()):
        return basis
    size = matrices.shape[-1]
    order = torch.arange(1, size + 1, dtype=basis.dtype, device=basis.device) / size
    projector = (basis * null.unsqueeze(-2)) @ basis.mT
    largest = values.amax(-1).clamp(min=torch.finfo(values.dtype).tiny)[:, None, None]
    inside = projector @ (order.unsqueeze(-1) * projector)
    settled, failed = _eigenvectors(matrices / largest - projector - inside)
    return torch.where(failed[:, None, None], basis, settled)


def kronecker_sum_solve(
    right: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], *, sign: float = 1.0
) -> Tensor:
    """V of B V A + sign D V C = right, that is of (B (x) A + sign D (x) C) rvec(V) = rvec(right).

    right: [..., d_out, d_in]. first: (B, A), positive definite. second: (D, C), symmetric. Diagonalises C in
    the metric of A and D in that of B, in float64 (Martens & Grosse 2015, arXiv:1503.05671; methods.md 2.3).
    """
    outer, d = _joint_basis(first[0], second[0])
    inner, c = _joint_basis(first[1], second[1])
    rotated = outer.mT @ right.double() @ inner
    scale = 1 + sign * d.unsqueeze(-1) * c.unsqueeze(-2)
    return (outer @ (rotated / scale) @ inner.mT).to(right.dtype)


def _joint_basis(metric: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(K, s) with K^T metric K = I and K^T matrix K = diag(s)."""
    root = torch.linalg.cholesky(metric.double())
    half = torch.linalg.solve_triangular(root, matrix.double(), upper=False)
    whitened = torch.linalg.solve_triangular(root, half.mT, upper=False)
    values, vectors = torch.linalg.eigh((whitened + whitened.mT) / 2)
    return torch.linalg.solve_triangular(root.mT, vectors, upper=True), values


def largest_eigenvalue(factor: Tensor) -> Tensor:
    """Largest eigenvalue per matrix, at least 0; 0 where the matrix is not finite.

    factor: [batch, d, d], or [d] for a diagonal one (returns [1]); positive semi-definite. Where eigenvalues
    would wait for the device (`host.waits`), by `dominant_eigenvalue`, to 1e-6 of it.
    """
    if factor.dim() == 1:
        largest = factor.amax().reshape(1)
        return largest.masked_fill(~torch.isfinite(largest), 0.0).clamp(min=0)
    finite = torch.isfinite(factor).flatten(1).all(1)
    safe = factor.masked_fill(~finite[:, None, None], 0.0)
    if host.waits(factor.device):
        return dominant_eigenvalue(safe)
    safe = safe.double()
    try:
        largest = torch.linalg.eigvalsh(safe)[:, -1]
    except torch.linalg.LinAlgError:  # type: ignore[reportPrivateImportUsage]
        largest = torch.linalg.matrix_norm(safe)  # an upper bound
    return largest.clamp(min=0).to(factor.dtype)


def dominant_eigenvalue(matrices: Tensor) -> Tensor:
    """Largest absolute eigenvalue of each symmetric matrix by 25 squarings: [batch]; nothing is read back.

    The largest entry of M^p lies between l^p / d and l^p, so that p = 2^25 gives l up to ln(d) / p of it,
    whatever the gap to the next one (Gelfand's formula). Products of the matrix's own precision, at least
    float32; rounding of the k-th counts 2^-k times.
    """
    power = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    logarithm = torch.zeros(len(matrices), dtype=torch.float64, device=matrices.device)
    for k in range(_SQUARINGS + 1):
        power = power if k == 0 else power @ power
        largest = torch.linalg.vector_norm(power, torch.inf, dim=(1, 2))
        largest = largest.clamp(min=torch.finfo(power.dtype).tiny)
        logarithm = logarithm + largest.double().log() / 2**k
        power = power / largest[:, None, None]
    return logarithm.exp().to(matrices.dtype)
