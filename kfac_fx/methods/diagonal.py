"""The exact diagonal of the Fisher matrix, from gradients of examples. A cheap baseline.

Kunstner, Balles & Hennig 2019 (arXiv:1905.12558) compare such diagonals; methods.md 9.2: positions and uses
are summed before the square.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kfac_fx.contracts import Statistics
from kfac_fx.methods.base import KroneckerFactored, zeros
from kfac_fx.types import FactorSpec, LayerMatch, Refreshed, State


@dataclass(frozen=True, kw_only=True)
class Diagonal(KroneckerFactored):
    """Diagonal of the Fisher matrix: V = grad / (S + lambda), entry by entry.

    damping: lambda, in units of the Hessian of the loss that is minimised (of the MEAN loss for mean losses).
    0: none, and no step where S is zero. decay: weight of the old average per statistics update.
    statistics_every: steps. inverse_every: 0, since nothing is inverted. kl_clip: bound on lr^2 <V, grad>,
    None for no bound. `sharing` has no influence. max_factor_dim: larger layers are left to the optimizer;
    there is no dense factor, so that the default excludes nothing.
    """

    damping: float = 0.03
    kl_clip: float | None = 1e-3
    inverse_every: int = 0
    max_factor_dim: int = 2**31

    name: ClassVar[str] = "diagonal"
    paper: ClassVar[str] = "Kunstner, Balles & Hennig 2019 (arXiv:1905.12558)"
    stored: ClassVar[str] = "S: d_A d_G"
    costs: ClassVar[tuple[str, str, str]] = ("2 n d_A d_G", "none", "d_A d_G")
    shared_names: ClassVar[frozenset[str]] = frozenset()

    def init(self, match: LayerMatch, *, dtype: torch.dtype, device: torch.device) -> State:
        """Zeros (the moving average is bias-corrected)."""
        if match.structure == "block":
            sizes = (match.groups, 1 if match.bias is None else 2)
            return zeros({"F": sizes}, dtype=dtype, device=device)
        return zeros({"S": (match.groups, match.d_out, match.d_in)}, dtype=dtype, device=device)

    def statistics_names(self, match: LayerMatch) -> tuple[str, ...]:
        """S, or F for blocks."""
        return ("F",) if match.structure == "block" else ("S",)

    def batch_statistics(self, statistics: Statistics, names: Sequence[str], state: State) -> State:
        """Squares of the gradients of examples, summed; of blocks their diagonal."""
        if "F" in names:
            return {"F": statistics.blocks().diagonal(dim1=-2, dim2=-1)}
        return {"S": statistics.squared_projections(None, None)} if names else {}

    def refresh(
        self, states: Mapping[str, State], *, counts: Mapping[str, int]
    ) -> tuple[dict[str, State], Refreshed]:
        """Nothing."""
        return {}, Refreshed(retried=0, kept_last=0)

    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        """V = grad / (S + lambda); 0 where that is zero."""
        (squares,) = state.values()
        damped = squares + self.damping
        return (gradient.to(damped.dtype) / damped).masked_fill(~(damped > 0), 0.0)

    def factors(self, match: LayerMatch, *, dtype: torch.dtype) -> tuple[FactorSpec, ...]:
        """One vector."""
        (squares,) = super().factors(match, dtype=dtype)
        return (replace(squares, dim=match.numel, count=1, diagonal=True, form="squares of gradients"),)

    def kept_sides(self, match: LayerMatch) -> tuple[str, ...]:
        """S, or F for blocks."""
        return self.statistics_names(match)

    def statistics_flops(self, match: LayerMatch, side: str) -> int:
        """2 rows d_in d_out; of a lookup one row of d_out."""
        if side == "F":
            return super().statistics_flops(match, side)
        size = match.groups * match.d_out * match.d_in
        per_row = size // match.d_in if match.structure == "diagonal" else 2 * size
        return match.num_passes * match.rows * per_row

    def refresh_flops(self, match: LayerMatch, side: str) -> int:
        """None."""
        return 0

    def apply_flops(self, match: LayerMatch, side: str) -> int:
        """One division per entry."""
        return match.numel
