"""K-FAC with KFC's factors for convolutions: moving averages, factored Tikhonov damping, Cholesky, KL clip.

Martens & Grosse 2015 (arXiv:1503.05671); Grosse & Martens 2016 (arXiv:1602.01407); expand and reduce weight
sharing of Eschenhagen et al. 2023 (arXiv:2311.00636). Formulas: methods.md sections 1 to 3 and 16.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kfac_fx.linalg import damped_inverses, join_orientations, mean_eigenvalue, pi_ratio, small_inverse
from kfac_fx.methods.base import (
    KroneckerFactored,
    apply_flops,
    factor_shapes,
    identity,
    kl_clipped,
    moment_flops,
    spec,
    two_sided,
    zeros,
)
from kfac_fx.types import FactorSpec, LayerMatch, Refreshed, State


@dataclass(frozen=True, kw_only=True)
class KFAC(KroneckerFactored):
    """Kronecker-factored approximate curvature.

    damping: lambda, in units of the Hessian of the loss that is minimised (of the MEAN loss for mean losses).
    decay: weight of the old average per statistics update. statistics_every, inverse_every: steps. kl_clip:
    bound on lr^2 <V, grad>, None for no bound. pi: balance the damping by the factors' traces.
    max_factor_dim: larger layers are left to the optimizer.
    """

    damping: float = 0.03
    kl_clip: float | None = 1e-3
    pi: bool = True

    name: ClassVar[str] = "kfac"

    def __post_init__(self) -> None:
        """Refuse values without meaning, by name."""
        super().__post_init__()
        clips = self.kl_clip is None or self.kl_clip > 0
        self._check("kl_clip", clips, "must be positive, or None for no clipping")

    def init(self, match: LayerMatch, *, dtype: torch.dtype, device: torch.device) -> State:
        """Zero factors (the moving average is bias-corrected) and identity inverses."""
        shapes = factor_shapes(match)
        state = zeros(shapes, dtype=dtype, device=device)
        for name in ("F",) if match.structure == "block" else ("A", "G"):
            state[f"{name}_inverse"] = identity(shapes[name], dtype=dtype, device=device)
        return state

    def refresh(
        self, states: Mapping[str, State], *, counts: Mapping[str, int]
    ) -> tuple[dict[str, State], Refreshed]:
        """Damped inverses of all factors, equal sizes in one batched call."""
        new: dict[str, State] = {key: {} for key in states}
        places, factors, dampings, last = [], [], [], []
        for key, state in states.items():
            if "F" in state:
                new[key]["F_inverse"] = small_inverse(state["F"], self.damping)
                continue
            sides = joined_sides(state)
            for name, factor, damping in zip(("A", "G"), sides, self.factor_dampings(*sides), strict=True):
                if factor.dim() == 1:
                    damped = factor + damping.to(factor.dtype)
                    new[key][f"{name}_inverse"] = torch.where(damped > 0, 1 / damped, 0.0)
                    continue
                places.append((key, f"{name}_inverse"))
                factors.append(factor)
                dampings.append(damping)
                last.append(state[f"{name}_inverse"])
        result = damped_inverses(factors, dampings, last=last)
        for (key, name), inverse in zip(places, result.inverses, strict=True):
            new[key][name] = inverse
        return new, Refreshed(retried=result.retried, kept_last=result.kept_last)

    def factor_dampings(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """(pi sqrt(lambda), sqrt(lambda) / pi) per group: rule D1 of methods.md 1.6."""
        a_mean, g_mean = mean_eigenvalue(a), mean_eigenvalue(g)
        root = self.damping**0.5
        pi = pi_ratio(a_mean, g_mean) if self.pi else torch.ones_like(a_mean)
        return pi * root, root / pi

    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        """V = G^-1 grad A^-1; for blocks F^-1 grad per channel."""
        if "F_inverse" in state:
            return solved_blocks(state["F_inverse"], gradient)
        return two_sided(state["G_inverse"], gradient, state["A_inverse"])

    def rescale(
        self, directions: list[Tensor], gradients: list[Tensor], *, learning_rates: Tensor
    ) -> list[Tensor]:
        """KL clip (rule C1 of methods.md 1.8)."""
        return kl_clipped(directions, gradients, learning_rates=learning_rates, bound=self.kl_clip)

    def factors(self, match: LayerMatch, *, dtype: torch.dtype) -> tuple[FactorSpec, ...]:
        """Statistics 2 rows d^2, Cholesky inverse d^3, apply 2 d^2 times the other side."""
        return tuple(
            spec(
                self,
                match,
                side,
                dtype=dtype,
                statistics=moment_flops(match, side),
                refresh=_inverse_flops(factor_shapes(match)[side]),
                apply=apply_flops(match, side),
            )
            for side in (("F",) if match.structure == "block" else ("A", "G"))
        )


def joined_sides(state: State) -> tuple[Tensor, Tensor]:
    """(A, G); for a tied weight those of both orientations together."""
    sides = state["A"], state["G"]
    if "A_swapped" in state:
        return join_orientations(*sides, state["A_swapped"], state["G_swapped"])
    return sides


def solved_blocks(inverse: Tensor, gradient: Tensor) -> Tensor:
    """F^-1 grad per channel. inverse: [channels, k, k]; gradient: [channels, k]."""
    return (inverse @ gradient.to(inverse.dtype).unsqueeze(-1)).squeeze(-1)


def _inverse_flops(sizes: tuple[int, ...]) -> int:
    return 2 * sizes[0] if len(sizes) == 1 else sizes[0] * sizes[1] ** 3
