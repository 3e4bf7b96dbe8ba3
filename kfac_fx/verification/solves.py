"""Directions by dense algebra in float64: damped Kronecker blocks, solved as one matrix where that is small.

Enters: a method's settings, explicit second moments, a gradient. Leaves: the preconditioned gradient of one
layer after a first batch and a first refresh, or why it has no independent formula. methods.md 1.6, 4 to 9.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfac_fx.contracts import Method
from kfac_fx.methods import EKFAC, FOOF, KFAC, KFC, NKFAC, SINGD, SKFAC, Diagonal
from kfac_fx.types import LayerMatch

LARGEST_DENSE = 1024  # d_in * d_out of a group whose Kronecker product is written out
Factors = Mapping[str, Tensor]


def expected_direction(method: Method, match: LayerMatch, factors: Factors, gradient: Tensor) -> Tensor | str:
    """The canonical direction, or a reason. factors: by name of the statistic; gradient: canonical."""
    gradient = gradient.double()
    if isinstance(method, Diagonal):
        (squares,) = factors.values()
        damped = squares.reshape(gradient.shape) + method.damping
        return torch.where(damped > 0, gradient / damped, 0.0)
    if "F" in factors:
        return _blocks(method, factors["F"], gradient)
    if isinstance(method, FOOF):
        return _per_group(factors["A"], None, gradient, lambda a, g: (method.damping, 0.0), method.damping)
    if isinstance(method, (NKFAC, SINGD)) and match.tied:
        return f"{method.name} of a weight that is used in both orientations has no independent formula"
    if isinstance(method, NKFAC):
        return nkfac_direction(method, {k: nkfac_share(method, f) for k, f in factors.items()}, gradient)
    if isinstance(method, SINGD):
        return _singd(method, factors, gradient)
    if isinstance(method, KFC) and method.spatially_uncorrelated_activations:
        return "spatially uncorrelated activations have no independent formula"
    if not isinstance(method, (KFAC, EKFAC, SKFAC)):
        return f"no independent formula for directions of {method.name}"
    if "A_swapped" in factors:
        factors = joined_orientations(factors)
    rule = "tikhonov" if isinstance(method, EKFAC) else method.damping_rule
    if rule == "tikhonov":
        return _block_damped(factors["A"], factors["G"], gradient, method.damping)

    def added(a: Tensor, g: Tensor) -> tuple[float, float]:
        return _added(rule, method.damping, a, g)

    return _per_group(factors["A"], factors["G"], gradient, added, method.damping)


def _added(rule: str, damping: float, a: Tensor, g: Tensor) -> tuple[float, float]:
    """What a rule adds to the eigenvalues of one pair; a may be a diagonal."""
    if rule == "full":
        return damping, damping
    if rule == "relative":
        return max(1e-4, damping * _top(a)), max(1e-4, damping * _top(g))
    root, pi = math.sqrt(damping), 1.0
    if rule == "factored":
        means = [float((m if m.dim() == 1 else m.diagonal()).mean()) for m in (a, g)]
        pi = math.sqrt(means[0] / means[1]) if min(means) > 0 else 1.0
    return pi * root, root / pi


def _per_group(a, g, gradient, added, damping: float) -> Tensor | str:  # noqa: ANN001
    """(G + d_G I)^-1 grad (A + d_A I)^-1, each group for itself. g None: the identity."""
    if damping == 0:
        return "without damping singular factors have no unique inverse"
    solved = []
    for number, block in enumerate(gradient):
        own = a if a.dim() == 1 else a[number]
        other = torch.eye(len(block), dtype=block.dtype, device=block.device) if g is None else g[number]
        d_a, d_g = added(own, other)
        solved.append(_solved(_damped(own, d_a), _damped(other, d_g), block))
    return torch.stack(solved)


def _solved(a: Tensor, g: Tensor, gradient: Tensor) -> Tensor:
    """(G (x) A)^-1 of the gradient's rows one after the other; a may be a diagonal."""
    if gradient.numel() <= LARGEST_DENSE:
        block = torch.kron(g.contiguous(), torch.diag(a) if a.dim() == 1 else a.contiguous())
        return torch.linalg.solve(block, gradient.flatten()).reshape(gradient.shape)
    half = torch.linalg.solve(g, gradient)
    return half / a if a.dim() == 1 else torch.linalg.solve(a, half.mT).mT


def _block_damped(a: Tensor, g: Tensor, gradient: Tensor, damping: float) -> Tensor | str:
    """(G (x) A + lambda I)^-1 grad."""
    if damping == 0:
        return "without damping singular factors have no unique inverse"
    solved = []
    for number, block in enumerate(gradient):
        own = a if a.dim() == 1 else a[number]
        if block.numel() <= LARGEST_DENSE:
            matrix = _damped(torch.kron(g[number], torch.diag(own) if own.dim() == 1 else own), damping)
            solved.append(torch.linalg.solve(matrix, block.flatten()).reshape(block.shape))
            continue
        g_values, q_g = torch.linalg.eigh(g[number])
        if own.dim() == 1:
            solved.append(q_g @ ((q_g.mT @ block) / (g_values[:, None] * own + damping)))
            continue
        a_values, q_a = torch.linalg.eigh(own)
        scaled = (q_g.mT @ block @ q_a) / (g_values.clamp(min=0)[:, None] * a_values.clamp(min=0) + damping)
        solved.append(q_g @ scaled @ q_a.mT)
    return torch.stack(solved)


def _blocks(method: Method, blocks: Tensor, gradient: Tensor) -> Tensor | str:
    """(F + lambda I)^-1 grad of every channel."""
    if not isinstance(method, (KFAC, EKFAC)):
        return f"no independent formula for blocks of {method.name}"
    if method.damping == 0:
        return "without damping singular factors have no unique inverse"
    damping = torch.full_like(gradient[:, 0], method.damping)
    if isinstance(method, KFAC) and method.damping_rule == "relative":
        damping = (method.damping * torch.linalg.eigvalsh(blocks)[:, -1]).clamp(min=1e-4)
    return torch.linalg.solve(blocks + torch.diag_embed(damping[:, None].expand_as(gradient)), gradient)


def nkfac_share(method: NKFAC, factor: Tensor) -> Tensor:
    """What one batch adds to an average: its moment with Frobenius norm 1 - decay, per group (5.2)."""
    norm = torch.linalg.vector_norm(factor, dim=(0,) if factor.dim() == 1 else (1, 2), keepdim=True)
    return (1 - method.decay) * factor / (norm + 1e-12)


def nkfac_direction(method: NKFAC, averages: Factors, gradient: Tensor) -> Tensor | str:
    """By exact inverses of averages, each damped relative to its largest eigenvalue (5.3)."""

    def added(a: Tensor, g: Tensor) -> tuple[float, float]:
        return nkfac_damping(method, a), nkfac_damping(method, g)

    return _per_group(averages["A"], averages["G"], gradient, added, 1.0)


def nkfac_damping(method: NKFAC, factor: Tensor) -> float:
    """Of one average, [d, d], or [d] of a diagonal."""
    return max(method.damping_floor, method.damping * _power(factor))


def _power(matrix: Tensor) -> float:
    """The published estimate of the largest eigenvalue: ten times two products, from a vector of ones, or
    from the column of the largest diagonal entry where ones are nearly in the null space (5.3, 19).
    """
    if matrix.dim() == 1:
        return float(matrix.max())
    v = torch.ones_like(matrix[0])
    if float((matrix @ v).norm()) < 1e-3 * float(matrix.norm()) * math.sqrt(len(v)):
        v = matrix[:, int(matrix.diagonal().argmax())]
    for _ in range(10):
        v = matrix @ v
        v = matrix @ (v / v.norm().clamp(min=1e-300))
    return float(v.norm())


def _singd(method: SINGD, factors: Factors, gradient: Tensor) -> Tensor:
    """One update of the roots K = C = I (section 8), then C C^T grad K K^T."""
    sides = factors["A"], factors["G"]
    roots = [torch.ones_like(m) if m.dim() == 1 else torch.ones_like(m[..., 0]).diag_embed() for m in sides]
    moved, _ = singd_update(method, roots, [torch.zeros_like(m) for m in sides], sides)
    return singd_direction(moved, gradient)


def singd_direction(roots: Sequence[Tensor], gradient: Tensor) -> Tensor:
    """C C^T grad K K^T. roots: K and C."""
    left = roots[1] @ roots[1].mT @ gradient
    return left * roots[0] ** 2 if roots[0].dim() == 1 else left @ roots[0] @ roots[0].mT


def singd_update(
    method: SINGD, roots: Sequence[Tensor], momenta: Sequence[Tensor], sides: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Roots K and C and their momenta after one batch (section 8). sides: A and G of the batch."""
    half = 0.5 * (1 - method.alpha1) if method.normalize_lr_cov else 0.5
    curved = [_between(root, side) for root, side in zip(roots, sides, strict=True)]
    lengths = [_between(root, None) for root in roots]
    new_roots, new_momenta = [], []
    for i in (0, 1):
        root, other = roots[i], 1 - i
        eye = torch.ones_like(root) if root.dim() == 1 else torch.ones_like(root[..., 0]).diag_embed()
        parts = [curved[i], lengths[i]]
        if method.traces_weigh:
            parts = [p * _mean(w[other], p) for p, w in zip(parts, (curved, lengths), strict=True)]
        momentum = half * (parts[0] + method.damping * parts[1] - eye) + method.alpha1 * momenta[i]
        rate: float | Tensor = method.lr_cov
        if method.normalize_lr_cov:
            largest = momentum.abs().amax() if root.dim() == 1 else momentum.abs().amax((1, 2), keepdim=True)
            rate = method.lr_cov / largest.clamp(min=1)
        step = eye - rate * momentum
        new_roots.append(root * step if root.dim() == 1 else root @ step)
        new_momenta.append(momentum)
    return new_roots, new_momenta


def _between(root: Tensor, moment: Tensor | None) -> Tensor:
    """K^T M K, or K^T K; of diagonals entry by entry."""
    if root.dim() == 1:
        return root**2 if moment is None else root**2 * moment
    return root.mT @ root if moment is None else root.mT @ moment @ root


def _mean(moment: Tensor, like: Tensor) -> Tensor:
    """The mean eigenvalue per group, to be multiplied with `like`."""
    mean = moment.mean() if moment.dim() == 1 else moment.diagonal(dim1=1, dim2=2).mean(1)
    return mean if like.dim() == 1 else mean.reshape(-1, 1, 1)


def joined_orientations(factors: Factors) -> dict[str, Tensor]:
    """One pair for a weight used in both orientations: partial traces of the sum of both blocks (9.4)."""

    def trace(m: Tensor) -> Tensor:
        return m.sum() if m.dim() == 1 else m.diagonal(dim1=-2, dim2=-1).sum()

    a, g, a_s, g_s = (factors[name] for name in ("A", "G", "A_swapped", "G_swapped"))
    inner = a * trace(g) + g_s * trace(a_s)
    outer = g * trace(a) + a_s * trace(g_s)
    total = trace(a) * trace(g) + trace(a_s) * trace(g_s)
    return {"A": inner, "G": outer / total.clamp(min=1e-300)}


def _damped(factor: Tensor, damping: float) -> Tensor:
    if factor.dim() == 1:
        return factor + damping
    return factor + damping * torch.eye(len(factor), dtype=factor.dtype, device=factor.device)


def _top(factor: Tensor) -> float:
    return float(factor.max() if factor.dim() == 1 else torch.linalg.eigvalsh(factor)[-1])
