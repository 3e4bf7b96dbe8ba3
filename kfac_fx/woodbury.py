"""Thin factors: U U^T + gamma I of side d, kept as rows X = U^T [groups, m, d] and inverted through an m x m
matrix.

With L L^T = U^T U + gamma I and Z = L^-1 U^T the inverse is (I - Z^T Z) / gamma. Tang et al. 2021 (SKFAC,
CVPR 2021); formulas, precision and the window: methods.md 4.1, 4.2 and 4.6. Batched tensors in, tensors out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_fx.linalg import add_diagonal, alike


def thin_inverses(rows: Sequence[Tensor], dampings: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(Z, usable) of each of a list of batches; equal sizes are one batched call.

    rows: each [batch, m, d]. dampings: each [batch], positive, in units of the factor's eigenvalues. Z:
    [batch, m, d] in float64, since I - Z^T Z cancels on the span of U, where the gradient lies. usable:
    [batch], False where the m x m matrix was not positive definite. Nothing is read back from the device.
    """
    results: dict[int, tuple[Tensor, Tensor]] = {}
    for indices in alike(rows):
        z, usable = whitened(torch.cat([rows[i] for i in indices]), torch.cat([dampings[i] for i in indices]))
        sizes = [rows[i].shape[0] for i in indices]
        results.update(zip(indices, zip(z.split(sizes), usable.split(sizes), strict=True), strict=True))
    return [results[index] for index in range(len(rows))]


def whitened(rows: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """(Z, usable): Z = L^-1 X with L L^T = X X^T + gamma I in float64. rows: [batch, m, d]; damping:
    [batch].
    """
    wide = rows.double()
    eye = torch.eye(rows.shape[1], dtype=torch.float64, device=rows.device)
    small = add_diagonal(wide @ wide.mT, damping)
    finite = torch.isfinite(small).flatten(1).all(1)
    root, info = torch.linalg.cholesky_ex(torch.where(finite[:, None, None], small, eye))
    usable = finite & (info == 0)
    root = torch.where(usable[:, None, None], root, eye)
    return torch.linalg.solve_triangular(root, wide, upper=False), usable


def materialised(z: Tensor, damping: Tensor) -> Tensor:
    """(I - Z^T Z) / gamma: [batch, d, d] from z [batch, m, d] and damping [batch]."""
    eye = torch.eye(z.shape[2], dtype=z.dtype, device=z.device)
    return (eye - z.mT @ z) / damping.to(z.dtype)[:, None, None]


def apply_right(matrix: Tensor, z: Tensor, damping: Tensor) -> Tensor:
    """M (U U^T + gamma I)^-1 without a d x d matrix: 4 r m d FLOPs. matrix: [groups, r, d]."""
    return (matrix - (matrix @ z.mT) @ z) / damping[:, None, None]


def apply_left(matrix: Tensor, z: Tensor, damping: Tensor) -> Tensor:
    """(U U^T + gamma I)^-1 M. matrix: [groups, d, r]."""
    return (matrix - z.mT @ (z @ matrix)) / damping[:, None, None]


def mean_eigenvalue_of_rows(rows: Tensor) -> Tensor:
    """||U||_F^2 / d, the mean eigenvalue of U U^T, in float64: [groups]."""
    return (rows.double() ** 2).sum((1, 2)) / rows.shape[2]


def compressed(rows: Tensor) -> Tensor:
    """At most d rows with the same X^T X: the triangular factor of X where it has more than d."""
    if rows.shape[1] <= rows.shape[2]:
        return rows
    return torch.linalg.qr(rows, mode="r").R


def joined_rows(first: Tensor, second: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """Rows of `weights[0]` times the first factor plus `weights[1]` times the second."""
    return compressed(torch.cat([first * weights[0].sqrt(), second * weights[1].sqrt()], 1))


def pushed(rows: Tensor, weights: Tensor, new: Tensor, *, decay: float) -> tuple[Tensor, Tensor]:
    """The window with a new block in front and the oldest dropped; (rows, weights).

    rows: [groups, window * block, d], newest block first. weights: [window], those of the blocks before they
    are made to sum to one. new: [groups, m, d], m at most d; fewer rows than a block holds are padded with
    zeros, more make every block longer. A window that would hold d rows becomes one average of d rows, from
    which nothing is dropped any more. A block that is not finite changes nothing.
    """
    window, dim = weights.shape[0], rows.shape[2]
    size = max(rows.shape[1] // window, new.shape[1])
    if window > 1 and max(rows.shape[1], window * size) >= dim:
        return _averaged_with(rows, weights, new, decay=decay)
    finite = torch.isfinite(new).all()
    blocks = padded(rows.unflatten(1, (window, -1)), size)
    shifted = torch.cat([padded(new, size).unsqueeze(1), blocks[:, :-1]], 1)
    reweighted = torch.cat([torch.ones_like(weights[:1]), weights[:-1] * decay])
    kept = torch.where(finite, shifted, blocks).flatten(1, 2)
    return kept, torch.where(finite, reweighted, weights)


def _averaged_with(rows: Tensor, weights: Tensor, new: Tensor, *, decay: float) -> tuple[Tensor, Tensor]:
    """One average of all blocks and a new one: d rows, and their total weight in the first place."""
    old, total = padded(averaged_rows(rows, weights), rows.shape[2]), weights.sum()
    finite = torch.isfinite(new).all()
    share = 1 / (1 + decay * total)
    mixed = joined_rows(old, new.masked_fill(~finite, 0.0), (1 - share, share))
    total = torch.where(finite, 1 + decay * total, total)
    return torch.where(finite, mixed, old), F.pad(total[None], (0, weights.shape[0] - 1))


def averaged_rows(rows: Tensor, weights: Tensor) -> Tensor:
    """Rows of the weighted mean of the window's factors, fewer than d; or the d rows of the one average.

    This is the bias-corrected moving average cut off after `window` batches (methods.md 4.6).
    """
    if rows.shape[1] >= rows.shape[2]:
        return rows
    shares = weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
    blocks = rows.unflatten(1, (weights.shape[0], -1))
    return (blocks * shares.sqrt()[:, None, None]).flatten(1, 2)


def padded(rows: Tensor, size: int) -> Tensor:
    """Zero rows added along the last axis but one, up to `size` rows."""
    return F.pad(rows, (0, 0, 0, size - rows.shape[-2]))
