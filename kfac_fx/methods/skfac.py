"""SKFAC: factors as thin sets of rows, inverted by the Sherman-Morrison-Woodbury identity.

Tang et al. 2021, "SKFAC: Training Neural Networks with Faster Kronecker-Factored Approximate Curvature" (CVPR
2021; no arXiv number). Formulas: methods.md sections 4 and 16.2; schedule, damping and base optimizer are
those of the authors' published code.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kfac_fx import woodbury
from kfac_fx.contracts import Statistics
from kfac_fx.linalg import mean_eigenvalue
from kfac_fx.methods import thin
from kfac_fx.methods.base import KroneckerFactored, zeros
from kfac_fx.methods.costs import factor_shapes, spec
from kfac_fx.methods.damping import inverted, paired_dampings
from kfac_fx.methods.thin import Rows, Side, Strategy
from kfac_fx.rows import drawn_positions
from kfac_fx.types import FactorSpec, LayerMatch, Refreshed, State


@dataclass(frozen=True, kw_only=True)
class SKFAC(KroneckerFactored):
    """K-FAC from the rows of a few batches, by the Woodbury identity.

    damping: lambda, in units of the Hessian of the loss that is minimised; positive. damping_rule: "factored"
    (sqrt(lambda) pi for A and sqrt(lambda) / pi for G, with the traces' pi), "sqrt" (sqrt(lambda) for both,
    as published) or "full" (lambda for both, in units of A and of G).

    strategy: what makes the rows of a convolution few. "reduce": one row per example, inputs averaged and
    gradients summed over positions, whatever `sharing` is. "subsample": `positions` positions per example,
    drawn with `seed` without replacement at every update, the same for the whole batch and for A and G;
    unbiased for the factors of sharing="expand", whatever `sharing` is. "receptive_field": patches are summed
    over the kernel, A has one row and column per channel and the bias its own 1x1 factor; positions are
    treated as `sharing` says; each batch has A's trace, so accumulated parts equal the whole in trace only.
    scale: of "reduce"; "exact", or "paper" (the mean of the gradients over T positions, G smaller by T^2).
    Other layers keep one row per example and position, or per example if `sharing` is "reduce".

    window: batches that a factor averages over, the newest with weight 1 and each older one with `decay`
    times the next one's, weights made to sum to one; 1 as published: the newest batch alone. A factor with as
    many rows as columns, dense or grown, averages over all batches instead if window > 1.
    The first batch decides the form: implicit while m < d/2, a formed inverse while m < d, else dense. Fewer
    rows of later batches are padded. More make the rows grow, to d of them at most (with the same factor), so
    that no form holds more than two d x d. max_factor_dim: of formed and dense ones.
    statistics_every, inverse_every: steps; the published 834 is 1/48 of an epoch of ImageNet at batch 32.
    kl_clip: bound on lr^2 <V, grad>, None for no bound, as published.
    """

    damping: float = 0.03
    damping_rule: Literal["factored", "sqrt", "full"] = "factored"
    strategy: Strategy = "reduce"
    scale: Literal["exact", "paper"] = "exact"
    positions: int = 4
    seed: int = 0
    window: int = 1
    kl_clip: float | None = None
    statistics_every: int = 834
    inverse_every: int = 834

    name: ClassVar[str] = "skfac"
    paper: ClassVar[str] = "Tang et al. 2021 (CVPR)"
    stored: ClassVar[str] = "rows of A and G and their Z: 2 m (d_A + d_G); dense as kfac where m >= d"
    costs: ClassVar[tuple[str, str, str]] = ("n (d_A + d_G)", "3 m^2 (d_A + d_G) + 2 m^3", "8 m d_A d_G")
    shared_names: ClassVar[frozenset[str]] = frozenset({"A", "A_rows", "A_weights", "A_bias", "A_draws"})
    growing_names: ClassVar[frozenset[str]] = frozenset({"A_rows", "G_rows", "A_z", "G_z"})

    def __post_init__(self) -> None:
        """Refuse values without meaning, by name."""
        super().__post_init__()
        choices = {
            "damping_rule": ("factored", "sqrt", "full"),
            "strategy": ("reduce", "subsample", "receptive_field"),
            "scale": ("exact", "paper"),
        }
        for name, allowed in choices.items():
            self._check(name, getattr(self, name) in allowed, f"must be one of {', '.join(allowed)}")
        self._check("damping", self.damping > 0, "must be positive: thin inverses divide by it")
        averages = self.window > 1 or self.decay == SKFAC.decay
        self._check("decay", averages, "has no effect with window=1, the newest batch alone; use window > 1")
        for name, strategy in (("scale", "reduce"), ("positions", "subsample"), ("seed", "subsample")):
            used = self.strategy == strategy or getattr(self, name) == getattr(SKFAC, name)
            self._check(name, used, f"has no effect with strategy={self.strategy!r}; use {strategy!r}")

    def base_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """SGD as published for ImageNet at batch 32."""
        return torch.optim.SGD(parameters, lr=0.00625, momentum=0.9, weight_decay=5e-4)

    def refuses(self, match: LayerMatch) -> str | None:
        """Scales and shifts of norms, which the paper leaves to the optimizer."""
        if match.structure == "block":
            return "SKFAC is for products with a matrix; norms get the plain gradient, as published"
        return None

    def rows(self, match: LayerMatch) -> Rows:
        """What the rows of this layer are."""
        return Rows.of(match, self.strategy, self.positions)

    def sides(self, match: LayerMatch) -> tuple[Side, Side]:
        """How A and G of this layer are kept."""
        rows = self.rows(match)
        sizes = {"window": self.window, "groups": match.groups, "dense": match.tied}
        a = Side(
            name="A",
            dim=match.channels if rows.by_field else match.d_in,
            block=rows.num,
            other=match.d_out * (match.kernel_volume if rows.by_field else 1),
            diagonal=match.structure == "diagonal",
            corner=rows.by_field and match.bias is not None,
            **sizes,
        )
        g = Side(name="G", dim=match.d_out, block=rows.num * match.num_passes, other=match.d_in, **sizes)
        return a, g

    def init(self, match: LayerMatch, *, dtype: torch.dtype, device: torch.device) -> State:
        """No curvature and identity inverses; thin rows as many as the first batch has."""
        state: State = {}
        for side in self.sides(match):
            state |= side.state(dtype=dtype, device=device)
        swapped = {n: sizes for n, sizes in factor_shapes(match).items() if n.endswith("swapped")}
        state |= zeros(swapped, dtype=dtype, device=device)
        if self.rows(match).subsampled:
            state["A_draws"] = torch.zeros((), dtype=torch.int64, device=device)
        return state

    def statistics_names(self, match: LayerMatch) -> tuple[str, ...]:
        """Rows of thin sides, second moments of dense ones."""
        if match.tied:
            return super().statistics_names(match)
        return tuple(name for side in self.sides(match) for name in side.statistics)

    def batch_statistics(self, statistics: Statistics, names: Sequence[str], state: State) -> State:
        """Rows, or second moments, of one batch."""
        match, own = statistics.match, self.rows(statistics.match)
        convolution = match.uses[0].geometry is not None
        few = convolution and (own.reduced or own.subsampled)
        by_rows = {"A" if few or own.by_field else "", "G" if few else ""}  # the others are moments
        moments = [name for name in names if not name.endswith("_rows") and name[0] not in by_rows]
        found = super().batch_statistics(statistics, moments, state)
        sides = {name[0] for name in names if name not in found}
        drawn = self._drawn(statistics, state) if own.subsampled else None
        if "A" in sides and own.by_field:
            summed, trace, corner = statistics.field_rows(reduced=own.reduced)
            found |= {"A_bias": corner} if match.bias is not None else {}
            rows = thin.scaled_field(summed, trace, volume=match.kernel_volume)
            found |= thin.thin_or_dense("A", rows, names)
        elif "A" in sides:
            rows = statistics.input_rows(reduced=own.reduced, positions=drawn)
            found |= thin.thin_or_dense("A", rows, names)
        if "G" in sides:
            rows = statistics.output_rows(reduced=own.reduced, positions=drawn)
            if self.scale == "paper" and convolution:
                rows = rows / sum(statistics.positions)
            found |= thin.thin_or_dense("G", rows, names)
        return found

    def _drawn(self, statistics: Statistics, state: State) -> list[Tensor]:
        """The positions of each use, the same for all layers that read one input in one way."""
        salt = self.seed ^ zlib.crc32(statistics.match.shared_a.encode())
        return [
            drawn_positions(state["A_draws"], seed=salt ^ use, num=num, count=self.positions)
            for use, num in enumerate(statistics.positions)
        ]

    def join(self, name: str, first: Tensor, second: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        """Rows side by side, each with the square root of its weight; second moments are linear."""
        if name.endswith("_rows"):
            return woodbury.joined_rows(first, second, weights)
        return super().join(name, first, second, weights)

    def mean_over(self, match: LayerMatch, name: str) -> int:
        """Examples where each gives one row, else rows; positions that are drawn stand for all."""
        return match.examples if self.rows(match).reduced else match.rows

    def fold(self, state: State, batch: State, *, weight: Tensor, inverse_scale: Tensor) -> State:
        """Push rows into the window; average second moments (over one batch alone if the window is one)."""
        weight = torch.ones_like(weight) if self.window == 1 else weight
        moments = {name: value for name, value in batch.items() if not name.endswith("_rows")}
        new = super().fold(state, moments, weight=weight, inverse_scale=inverse_scale)
        for name in (name for name in batch if name not in moments):
            weights = name.removesuffix("rows") + "weights"
            pushed = woodbury.pushed(state[name], state[weights], batch[name], decay=self.decay)
            new[name], new[weights] = pushed
        if "A_draws" in state and any(name.startswith("A") for name in batch):
            new["A_draws"] = state["A_draws"] + 1
        return new

    def refresh(
        self, states: Mapping[str, State], *, counts: Mapping[str, int]
    ) -> tuple[dict[str, State], Refreshed]:
        """Z of thin sides and inverses of dense ones, equal sizes in one batched call."""
        factors = {key: thin.current_factors(state) for key, state in states.items()}
        dampings = {key: self.dampings(states[key], pair) for key, pair in factors.items()}
        dense = {
            key: [None if f"{name}_rows" in states[key] else f for name, f in zip("AG", pair, strict=True)]
            for key, pair in factors.items()
        }
        new, refreshed = inverted(dense, dampings, states, undamped=False)
        kept = thin.refresh_sides(states, new, factors, dampings)
        return new, replace(refreshed, kept_last=refreshed.kept_last + kept)

    def dampings(self, state: State, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(gamma_A, gamma_G) per group, in the precision of the state: rules D1 to D3 of methods.md 1.6."""
        means = [
            woodbury.mean_eigenvalue_of_rows(f) if f"{name}_rows" in state else mean_eigenvalue(f).double()
            for name, f in zip("AG", factors, strict=True)
        ]
        a, g = paired_dampings(self.damping_rule, self.damping, *means)
        return a.to(factors[0].dtype), g.to(factors[1].dtype)

    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        """V = G^-1 grad A^-1, each side in the form that the state holds."""
        return thin.applied_right(state, thin.applied_left(state, gradient))

    def factors(self, match: LayerMatch, *, dtype: torch.dtype) -> tuple[FactorSpec, ...]:
        """Costs of methods.md 16.6 by the form of each side."""
        return tuple(
            replace(
                spec(
                    self,
                    match,
                    side.name,
                    dtype=dtype,
                    statistics=side.statistics_flops(match),
                    refresh=side.refresh_flops,
                    apply=side.apply_flops,
                    form=_form(side, match),
                    columns=side.columns if side.thin else None,
                ),
                dim=side.dim,
            )
            for side in self.sides(match)
        )


def _form(side: Side, match: LayerMatch) -> str | None:
    """How this side is computed, in words; None: as the second moments of other methods are."""
    if side.thin:
        return f"{side.form} inverse of rows"
    return None if match.uses[0].geometry is None else "rows^T rows"
