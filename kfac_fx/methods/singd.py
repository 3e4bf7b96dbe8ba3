"""SINGD and IKFAC with dense factors: roots of the inverse factors, updated by matrix products alone.

Lin, Dangel, Eschenhagen et al. 2023 (arXiv:2312.05705); published code: f-dangel/singd. Formulas: methods.md
sections 8 and 16.5. Structured roots (diagonal, hierarchical, Toeplitz) are not offered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from kfac_fx.linalg import join_orientations, mean_eigenvalue
from kfac_fx.methods.base import KroneckerFactored, all_finite, identity, zeros
from kfac_fx.methods.costs import factor_shapes
from kfac_fx.types import LayerMatch, Refreshed, State


@dataclass(frozen=True, kw_only=True)
class SINGD(KroneckerFactored):
    """Inverse-free natural gradient: roots K, C with K K^T ~ A^-1 and C C^T ~ G^-1 move by natural gradients.

    damping: lambda, in units of the Hessian of the loss that is minimised. alpha1: share of the old momentum
    of K and C that is kept per update, in [0, 1). lr_cov: beta_1, step length of K and C per update; K may
    diverge if lr_cov times the largest eigenvalue of the momentum exceeds one. In the state K is `A_root` and
    C is `G_root`. normalize_lr_cov: divide
    lr_cov by the largest entry of the momentum where that exceeds one. statistics_every: steps between
    updates of K and C. inverse_every: 0, since nothing is inverted. Nothing is averaged: there is no `decay`.
    """

    damping: float = 1e-3
    alpha1: float = 0.5
    lr_cov: float = 1e-2
    normalize_lr_cov: bool = False
    statistics_every: int = 10
    inverse_every: int = 0

    name: ClassVar[str] = "singd"
    paper: ClassVar[str] = "Lin, Dangel, Eschenhagen et al. 2023 (arXiv:2312.05705)"
    stored: ClassVar[str] = "K, C and their momenta: 2 (d_A^2 + d_G^2)"
    costs: ClassVar[tuple[str, str, str]] = (
        "2 n (d_A^2 + d_G^2) + 8 (d_A^3 + d_G^3)",
        "none",
        "4 d_A d_G (d_A + d_G)",
    )
    decay: ClassVar[float] = 0.0
    shared_names: ClassVar[frozenset[str]] = frozenset()  # K depends on G through traces

    def __post_init__(self) -> None:
        """Refuse values without meaning, by name."""
        super().__post_init__()
        self._check("alpha1", 0 <= self.alpha1 < 1, "must lie in [0, 1)")
        self._check("lr_cov", 0 < self.lr_cov <= 1, "must lie in (0, 1]")

    @property
    def traces_weigh(self) -> bool:
        """Whether each side's curvature counts in proportion to the trace of the other's; K-FAC's does
        not.
        """
        return True

    def base_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """SGD with the published defaults."""
        return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    def refuses(self, match: LayerMatch) -> str | None:
        """Scales and shifts: the update is one of two factors."""
        if match.structure == "block":
            without = "scales, shifts and added parameters have none"
            return f"{self.name} moves roots of two Kronecker factors; {without}"
        return None

    def init(self, match: LayerMatch, *, dtype: torch.dtype, device: torch.device) -> State:
        """Identity roots, and zero momenta unless alpha1 is 0."""
        shapes = {side: factor_shapes(match)[side] for side in ("A", "G")}
        roots = {f"{s}_root": identity(sizes, dtype=dtype, device=device) for s, sizes in shapes.items()}
        if self.alpha1 == 0:
            return roots
        momenta = {f"{side}_momentum": sizes for side, sizes in shapes.items()}
        return {**roots, **zeros(momenta, dtype=dtype, device=device)}

    def fold(self, state: State, batch: State, *, weight: Tensor, inverse_scale: Tensor) -> State:
        """One update of the momenta m_K, m_C and then of K <- K (I - lr_cov m_K), C likewise.

        A batch that makes any of them not finite leaves all as they are.
        """
        moments = dict(zip(("A", "G"), _joined_moments(batch), strict=True))
        curvature = {side: _rotated(state[f"{side}_root"], m) for side, m in moments.items()}
        length = {side: _rotated(state[f"{side}_root"], None) for side in moments}
        new: State = {}
        for side, other in (("A", "G"), ("G", "A")):
            momentum = self._natural_gradient(curvature[side], length[side], curvature[other], length[other])
            if self.alpha1:
                momentum = momentum + self.alpha1 * state[f"{side}_momentum"]
                new[f"{side}_momentum"] = momentum
            new[f"{side}_root"] = self._moved(state[f"{side}_root"], momentum)
        finite = torch.stack([all_finite(tensor) for tensor in new.values()]).all()
        return {name: torch.where(finite, tensor, state[name]) for name, tensor in new.items()}

    def _natural_gradient(self, own: Tensor, length: Tensor, other: Tensor, other_length: Tensor) -> Tensor:
        """1/2 [tr(H_C)/d_G H_K + lambda tr(C^T C)/d_G K^T K - I] for K, and the same for C.

        own, other: H_K = K^T A K and H_C. length, other_length: K^T K and C^T C. Without `traces_weigh` both
        traces count as one. With `normalize_lr_cov` the half is (1 - alpha1)/2.
        """
        if self.traces_weigh:
            own = own * _spread(mean_eigenvalue(other), own)
            length = length * _spread(mean_eigenvalue(other_length), length)
        eye = identity(own.shape, dtype=own.dtype, device=own.device)
        half = 0.5 * (1 - self.alpha1) if self.normalize_lr_cov else 0.5
        return half * (own + self.damping * length - eye)

    def _moved(self, root: Tensor, momentum: Tensor) -> Tensor:
        """K (I - lr_cov m)."""
        step = root * momentum if root.dim() == 1 else root @ momentum
        if not self.normalize_lr_cov:
            return root - self.lr_cov * step
        largest = momentum.abs().amax().reshape(1) if root.dim() == 1 else momentum.abs().amax((1, 2))
        return root - _spread(self.lr_cov / largest.clamp(min=1), step) * step

    def refresh(
        self, states: Mapping[str, State], *, counts: Mapping[str, int]
    ) -> tuple[dict[str, State], Refreshed]:
        """Nothing."""
        return {}, Refreshed(retried=0, kept_last=0)

    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        """V = C C^T grad K K^T."""
        a_root, g_root = state["A_root"], state["G_root"]
        half = g_root @ (g_root.mT @ gradient.to(g_root.dtype))
        return half * a_root**2 if a_root.dim() == 1 else (half @ a_root) @ a_root.mT

    def statistics_flops(self, match: LayerMatch, side: str) -> int:
        """Second moments, and four products of d^3 to move the root."""
        return super().statistics_flops(match, side) + _update_flops(factor_shapes(match)[side])

    def refresh_flops(self, match: LayerMatch, side: str) -> int:
        """None."""
        return 0

    def apply_flops(self, match: LayerMatch, side: str) -> int:
        """Two products per side."""
        return 2 * super().apply_flops(match, side)


@dataclass(frozen=True, kw_only=True)
class IKFAC(SINGD):
    """Inverse-free K-FAC: K K^T and C C^T follow the damped inverses of moving averages of A and G.

    Equal to the inverses of averages of A + lambda I and G + lambda I up to O(lr_cov^2) per update, where
    lr_cov is the weight of the new batch. Settings are SINGD's without `alpha1`.
    """

    name: ClassVar[str] = "ikfac"
    stored: ClassVar[str] = "K, C: d_A^2 + d_G^2"
    alpha1: ClassVar[float] = 0.0

    @property
    def traces_weigh(self) -> bool:
        """No."""
        return False


def _joined_moments(batch: State) -> tuple[Tensor, Tensor]:
    """(A, G) of a batch; for a tied weight one product for both orientations, with the trace of A kept."""
    a, g = batch["A"], batch["G"]
    if "A_swapped" not in batch:
        return a, g
    inner, outer = join_orientations(a, g, batch["A_swapped"], batch["G_swapped"])
    share = mean_eigenvalue(a) / mean_eigenvalue(inner)
    return inner * _spread(share, inner), outer / _spread(share, outer)


def _rotated(root: Tensor, moment: Tensor | None) -> Tensor:
    """K^T M K, or K^T K without M; elementwise for diagonal ones."""
    if root.dim() == 1:
        return root**2 if moment is None else root**2 * moment
    return root.mT @ (root if moment is None else moment @ root)


def _spread(scale: Tensor, like: Tensor) -> Tensor:
    """One number per group as a factor of `like`. scale: [groups], or [1] for a diagonal `like`."""
    return scale if like.dim() == 1 else scale[:, None, None]


def _update_flops(sizes: tuple[int, ...]) -> int:
    return 8 * sizes[0] if len(sizes) == 1 else 8 * sizes[0] * sizes[1] ** 3
