"""Approximate inverses by guarded Newton steps, and the largest eigenvalue that sets their damping.

Batched tensors in, batched tensors out: `[batch, d, d]`, symmetric, positive semi-definite. No function reads
a value on the host. Sun, Yong & Zhang 2023 (NKFAC, ECML-PKDD); methods.md 5.3, 5.4 and 19.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_SPECTRAL_MARGIN = 1.25
_SPECTRAL_PAIRS = 10


def top_eigenvalue(matrices: Tensor, *, iterations: int = 10) -> Tensor:
    """Largest eigenvalue of each matrix by power iteration, from below: [batch]; 0 for a zero matrix.

    iterations: of two products with a vector each. The start is all ones, as published, or the column with
    the largest diagonal entry where ones lie almost in the null space: exactly so for G of a layer under
    softmax cross-entropy, whose gradients sum to zero (methods.md 19, pitfall P25).
    """
    row = _start(matrices)  # rows [batch, 1, d]: products from the left are many times as fast on a CPU
    for _ in range(iterations):
        row = _unit(row @ matrices) @ matrices.mT
    return torch.linalg.vector_norm(row, dim=(1, 2))


def _start(matrices: Tensor) -> Tensor:
    size = matrices.shape[-1]
    ones = torch.ones_like(matrices[:, :1])
    reached = torch.linalg.vector_norm(ones @ matrices, dim=(1, 2))
    small = reached < 1e-3 * frobenius_norm(matrices) * size**0.5
    largest = matrices.diagonal(dim1=1, dim2=2).argmax(1)
    column = matrices.gather(1, largest[:, None, None].expand(-1, 1, size))  # of a symmetric matrix: the row
    return torch.where(small[:, None, None], column, ones)


def _unit(vectors: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(vectors, dim=(1, 2), keepdim=True)
    return vectors / norms.clamp(min=torch.finfo(vectors.dtype).tiny)


def relative_damping(factor: Tensor, *, relative: float, floor: float) -> Tensor:
    """max(floor, relative * largest eigenvalue): [batch], or 0-dim for a diagonal factor [d].

    Rule D4 of methods.md 1.6.
    """
    top = factor.max() if factor.dim() == 1 else top_eigenvalue(factor)
    return (relative * top).clamp(min=floor)


def frobenius_norm(matrices: Tensor) -> Tensor:
    """[batch, d, d] -> [batch]."""
    return torch.linalg.vector_norm(matrices, dim=(1, 2))


def spectral_bound(matrices: Tensor) -> Tensor:
    """The largest singular value of each matrix, at most 25% too large: [batch].

    Ten pairs of products with a vector find it from below; a quarter is added, since the safeguard needs a
    bound from above, and the Frobenius norm, a true bound, is the most that is returned. The start is a fixed
    vector without structure, so that no random numbers are drawn.
    """
    index = torch.arange(1, matrices.shape[-1] + 1, dtype=torch.float64, device=matrices.device)
    start = (index * 0.6180339887498949).frac() - 0.5
    row = start.to(matrices.dtype).expand(matrices.shape[0], 1, -1)
    for _ in range(_SPECTRAL_PAIRS):
        row = _unit(row @ matrices.mT) @ matrices
    found = torch.linalg.vector_norm(row, dim=(1, 2))
    return torch.minimum(_SPECTRAL_MARGIN * found, frobenius_norm(matrices))


GUARDS: dict[str, Callable[[Tensor], Tensor]] = {"frobenius": frobenius_norm, "spectral": spectral_bound}


def newton_step(matrices: Tensor, inverses: Tensor, *, guard: str) -> Tensor:
    """One step towards the inverse: ((1 + al) I - al T) B with T = B M.

    al = 1 (Newton-Schulz: the error I - T is squared) where the norm of I - T is below 1, else 1 / norm of T,
    which lets every eigenvalue of T move towards 1 and never past it: the error cannot grow. NaN where the
    norm overflows, else al = 0 would hold B for ever. guard: the norm, a name of `GUARDS`. methods.md 5.3 and
    5.4, supplement of the paper, equation (1).
    """
    norm = GUARDS[guard]
    product = inverses @ matrices
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    error = norm(eye - product)
    rate = (1 / norm(product)).masked_fill(~(error >= 1), 1.0)
    rate = rate.masked_fill(~torch.isfinite(error), torch.nan)[:, None, None]
    return ((1 + rate) * eye - rate * product) @ inverses


def newton_inverse(matrices: Tensor, last: Tensor, *, steps: int, guard: str) -> Tensor:
    """Inverse by this many steps from `last`."""
    inverses = last
    for _ in range(steps):
        inverses = newton_step(matrices, inverses, guard=guard)
    return inverses


def exact_inverse(matrices: Tensor) -> Tensor:
    """Inverse by LU; NaN for a matrix that is singular or not finite (LAPACK does not see the latter).

    On a CPU one by one: torch factorises a batch in several threads, for which MKL's LU is not made
    (pytorch/pytorch#141358: errors, wrong results, hangs).
    """
    finite = torch.isfinite(matrices).flatten(1).all(1)
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    safe = torch.where(finite[:, None, None], matrices, eye)
    if safe.device.type == "cpu":
        inverses, info = map(torch.stack, zip(*map(torch.linalg.inv_ex, safe.unbind()), strict=True))
    else:
        inverses, info = torch.linalg.inv_ex(safe)
    return inverses.masked_fill(~(finite & (info == 0))[:, None, None], torch.nan)


def symmetrised(matrices: Tensor) -> Tensor:
    """Half the sum with the transpose, which rounding makes differ."""
    return 0.5 * (matrices + matrices.mT)


def kept_where_not_finite(new: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """New matrices, the last one where the new is not finite, and which those are: [batch], bool."""
    finite = torch.isfinite(new).flatten(1).all(1)
    return torch.where(finite[:, None, None], new, last), ~finite
