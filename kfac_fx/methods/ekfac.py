"""EKFAC: the eigenvectors of K-FAC's factors with the exact diagonal of the curvature in that basis.

George et al. 2018, "Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis"
(arXiv:1806.03884). Formulas: methods.md sections 6 and 16.4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kfac_fx.contracts import Statistics
from kfac_fx.methods.base import KroneckerFactored, averaged, identity, zeros
from kfac_fx.methods.costs import eigen_flops, factor_shapes, rotation_flops, row_flops
from kfac_fx.methods.damping import inverted_blocks
from kfac_fx.methods.eigenbasis import decomposed, outer, solved_in_basis
from kfac_fx.methods.kfac import joined_sides, solved_blocks
from kfac_fx.types import LayerMatch, Refreshed, State


@dataclass(frozen=True, kw_only=True)
class EKFAC(KroneckerFactored):
    """K-FAC's eigenbasis with corrected eigenvalues: the exact diagonal of the curvature in that basis.

    damping: lambda, added to the eigenvalues S; in units of the Hessian of the loss that is minimised (of the
    MEAN loss for mean losses). 0: none, and no step where S is zero. decay: weight of the old average of A
    and G per statistics update. scale_decay: the same for S, in [0, 1); 0: S is that of the newest batch. At
    each refresh of the basis S starts again from K-FAC's eigenvalues, so refreshes have to be rarer than
    statistics: where every statistics step is a refresh step, EKFAC is K-FAC. statistics_every: steps between
    statistics of A, G and S. inverse_every: steps between refreshes of the basis. kl_clip: bound on lr^2 <V,
    grad>, None for no bound. max_factor_dim: larger layers are left to the optimizer.
    """

    damping: float = 0.03
    scale_decay: float = 0.75
    kl_clip: float | None = 1e-3
    statistics_every: int = 10
    inverse_every: int = 100

    name: ClassVar[str] = "ekfac"
    paper: ClassVar[str] = "George et al. 2018 (arXiv:1806.03884)"
    stored: ClassVar[str] = "A, G, their eigenvectors and S: 2 (d_A^2 + d_G^2) + d_A d_G"
    costs: ClassVar[tuple[str, str, str]] = (
        "4 n (d_A^2 + d_G^2) + 2 n d_A d_G",
        "9 (d_A^3 + d_G^3)",
        "4 d_A d_G (d_A + d_G)",
    )
    shared_names: ClassVar[frozenset[str]] = frozenset({"A", "A_basis"})

    def __post_init__(self) -> None:
        """Refuse values without meaning, by name."""
        super().__post_init__()
        self._check("scale_decay", 0 <= self.scale_decay < 1, "must lie in [0, 1)")

    def init(self, match: LayerMatch, *, dtype: torch.dtype, device: torch.device) -> State:
        """Zero factors and identity bases, none for a diagonal A; S is zero. Blocks as in K-FAC."""
        shapes = factor_shapes(match)
        if match.structure == "block":
            block = zeros(shapes, dtype=dtype, device=device)
            return block | {"F_inverse": identity(shapes["F"], dtype=dtype, device=device)}
        scale = {"S": (match.groups, match.d_out, match.d_in)}
        state = zeros(shapes | scale, dtype=dtype, device=device)
        for side in ("A", "G"):
            if len(shapes[side]) > 1:
                state[f"{side}_basis"] = identity(shapes[side], dtype=dtype, device=device)
        return state

    def statistics_names(self, match: LayerMatch) -> tuple[str, ...]:
        """A, G and S; F for blocks."""
        names = super().statistics_names(match)
        return names if match.structure == "block" else (*names, "S")

    def batch_statistics(self, statistics: Statistics, names: Sequence[str], state: State) -> State:
        """A and G by the setting of `sharing`; S from whole gradients of examples, in the present basis."""
        batch = super().batch_statistics(statistics, [name for name in names if name != "S"], state)
        if "S" in names:
            batch["S"] = statistics.squared_projections(state.get("A_basis"), state["G_basis"])
        return batch

    def fold(self, state: State, batch: State, *, weight: Tensor, inverse_scale: Tensor) -> State:
        """Moving averages of A, G and F; S with `scale_decay`. A batch that is not finite leaves the old."""
        rest = {name: new for name, new in batch.items() if name != "S"}
        new = super().fold(state, rest, weight=weight, inverse_scale=inverse_scale)
        if "S" in batch:
            new["S"] = averaged(state["S"], batch["S"], torch.full_like(weight, 1 - self.scale_decay))
        return new

    def refresh(
        self, states: Mapping[str, State], *, counts: Mapping[str, int]
    ) -> tuple[dict[str, State], Refreshed]:
        """New bases of all factors, equal sizes in one batched call; S = l_G l_A^T."""
        new, rest = inverted_blocks("tikhonov", self.damping, states)
        changed, refreshed = decomposed({key: joined_sides(s) for key, s in rest.items()}, rest)
        for key, tensors in changed.items():
            scale = outer(tensors.pop("G_eigenvalues"), tensors.pop("A_eigenvalues"))
            new[key] = tensors | {"S": torch.where(torch.isfinite(scale).all(), scale, rest[key]["S"])}
        return new, refreshed

    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        """V = Q_G [(Q_G^T grad Q_A) / (S + lambda)] Q_A^T; for blocks F^-1 grad per channel."""
        if "F_inverse" in state:
            return solved_blocks(state["F_inverse"], gradient)
        return solved_in_basis(state, gradient, state["S"] + self.damping)

    def kept_sides(self, match: LayerMatch) -> tuple[str, ...]:
        """F, or A, G and S."""
        sides = super().kept_sides(match)
        return sides if match.structure == "block" else (*sides, "S")

    def statistics_flops(self, match: LayerMatch, side: str) -> int:
        """Second moments; of S the rotated rows, gradients of examples, squares."""
        if side != "S":
            return super().statistics_flops(match, side)
        rotated = sum(row_flops(match, side) for side in ("A", "G"))
        per_pass = match.rows if match.structure == "diagonal" else 2 * match.groups * match.rows * match.d_in
        return rotated + match.num_passes * per_pass * match.d_out

    def refresh_flops(self, match: LayerMatch, side: str) -> int:
        """Eigenvectors 9 d^3; of S one product per entry, of a block two operations."""
        if side == "S":
            return _entries(match)
        return 2 * match.groups if side == "F" else eigen_flops(factor_shapes(match)[side])

    def apply_flops(self, match: LayerMatch, side: str) -> int:
        """Two rotations per side; of S one division per entry."""
        if side == "S":
            return _entries(match)
        return super().apply_flops(match, side) if side == "F" else rotation_flops(match, side)


def _entries(match: LayerMatch) -> int:
    return match.groups * match.d_out * match.d_in
