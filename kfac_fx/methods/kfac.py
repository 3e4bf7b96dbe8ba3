"""K-FAC with KFC's factors for convolutions: moving averages, factored Tikhonov damping, Cholesky, KL clip.

Martens & Grosse 2015 (arXiv:1503.05671); Grosse & Martens 2016 (arXiv:1602.01407); expand and reduce weight
sharing of Eschenhagen et al. 2023 (arXiv:2311.00636). Formulas: methods.md sections 1 to 3 and 16.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from kfac_fx.linalg import join_orientations
from kfac_fx.methods.base import KroneckerFactored, identity, two_sided, zeros
from kfac_fx.methods.costs import eigen_flops, factor_shapes, rotation_flops
from kfac_fx.methods.damping import RULES, inverted, inverted_blocks, paired_dampings, scale
from kfac_fx.methods.eigenbasis import decomposed, outer, solved_in_basis
from kfac_fx.types import LayerMatch, QuadraticSettings, Refreshed, State

_QUADRATIC = (
    "adaptive_damping",
    "adaptive_gamma",
    "l2",
    "model_momentum",
    "adapt_every",
    "adapt_rate",
    "damping_bounds",
    "gamma_every",
)


@dataclass(frozen=True, kw_only=True)
class KFAC(KroneckerFactored):
    """Kronecker-factored approximate curvature.

    damping: lambda. 0: no damping, but the pseudo-inverse of every factor, under any rule. decay: weight of
    the old average per statistics update. statistics_every, inverse_every: steps. kl_clip: bound on
    lr^2 <V, grad>, None for no bound. max_factor_dim: larger layers are left to the optimizer.
    damping_rule: where lambda enters (methods.md 1.6), and with it the units of lambda.
      "tikhonov": G (x) A + lambda I, exactly, through eigenvectors. Units of the Hessian of the loss that is
        minimised: of the MEAN loss for mean losses; a sum loss needs lambda times the number of its terms.
      "factored": A + pi sqrt(lambda) I and G + sqrt(lambda)/pi I, pi balances the traces. The same units.
      "sqrt": A + sqrt(lambda) I and G + sqrt(lambda) I. The same units, but the step depends on how the scale
        of the block is split: A is a mean of squared inputs, G carries the scale of the loss.
      "full": A + lambda I and G + lambda I: units of A and of G at once.
      "relative": A + max(1e-4, lambda l_max(A)) I, the same for G: lambda has no units.
    quadratic_model: take length and momentum of the update from the exact quadratic model of the loss (C3 of
    methods.md 1.8) in place of kl_clip, the learning rate and the optimizer's momentum. model_momentum: with
    it, let the last update take part. l2: eta of the objective loss + eta/2 |theta|^2, units of lambda.
    adaptive_damping: with it, every adapt_every steps multiply or divide lambda by adapt_rate^adapt_every
    (Levenberg-Marquardt), within damping_bounds. adaptive_gamma: with the quadratic model and the rule
    "factored", adapt gamma of A + pi gamma I and G + gamma/pi I apart from lambda, where it is else
    sqrt(lambda + eta): every gamma_every steps, a multiple of inverse_every, try gamma, w gamma and gamma/w,
    w = sqrt(adapt_rate)^gamma_every, and keep the one whose update has the least quadratic model. Those steps
    refresh and precondition three times; gamma^2 stays within damping_bounds.
    """

    damping: float = 0.03
    damping_rule: str = "factored"
    kl_clip: float | None = 1e-3
    quadratic_model: bool = False
    model_momentum: bool = True
    l2: float = 0.0
    adaptive_damping: bool = False
    adapt_every: int = 5
    adapt_rate: float = 19 / 20
    damping_bounds: tuple[float, float] = (1e-8, math.inf)
    adaptive_gamma: bool = False
    gamma_every: int = 20

    name: ClassVar[str] = "kfac"
    paper: ClassVar[str] = "Martens & Grosse 2015 (arXiv:1503.05671)"
    stored: ClassVar[str] = "A, G and their inverses: 2 (d_A^2 + d_G^2)"
    costs: ClassVar[tuple[str, str, str]] = (
        "2 n (d_A^2 + d_G^2)",
        "d_A^3 + d_G^3",
        "2 d_A d_G (d_A + d_G)",
    )

    shared_names: ClassVar[frozenset[str]] = frozenset({"A", "A_basis", "A_eigenvalues"})

    def __post_init__(self) -> None:
        """Refuse values without meaning, by name."""
        super().__post_init__()
        self._check("damping_rule", self.damping_rule in RULES, f"must be one of {', '.join(RULES)}")
        self._check_quadratic()

    def _check_quadratic(self) -> None:
        rules = ("tikhonov", "factored", "sqrt")
        least, largest = self.damping_bounds
        for name, holds, rule in (
            ("adapt_rate", 0 < self.adapt_rate < 1, "must lie in (0, 1)"),
            ("damping_bounds", 0 < least <= largest, "must be positive and in order"),
            ("l2", 0 <= self.l2 < math.inf, "must be finite and not negative"),
        ):
            self._check(name, holds, rule)
        if not self.quadratic_model:
            for name in _QUADRATIC:
                idle = getattr(self, name) == getattr(KFAC, name)
                self._check(name, idle, "needs quadratic_model=True")
            return
        clips = self.kl_clip not in (None, KFAC.kl_clip)
        self._check("kl_clip", not clips, "has no effect with quadratic_model=True")
        known = self.damping_rule in rules
        self._check("damping_rule", known, f"quadratic_model=True needs one of {', '.join(rules)}")
        adds = self.damping > 0 or not (self.l2 or self.adaptive_damping or self.adaptive_gamma)
        self._check("damping", adds, "must be positive with l2, adaptive_damping or adaptive_gamma")
        if self.adaptive_gamma:
            factored = self.damping_rule == "factored"
            self._check("damping_rule", factored, 'adaptive_gamma=True needs "factored"')
            fits = self.gamma_every % self.inverse_every == 0
            rule = f"adaptive_gamma=True needs a multiple of inverse_every={self.inverse_every}"
            self._check("gamma_every", fits, rule)

    @property
    def quadratic(self) -> QuadraticSettings | None:
        """The settings of the quadratic model, if it is used."""
        if not self.quadratic_model:
            return None
        return QuadraticSettings(
            momentum=self.model_momentum,
            l2=self.l2,
            adapt_every=self.adapt_every if self.adaptive_damping else 0,
            adapt_factor=self.adapt_rate**self.adapt_every,
            damping_bounds=self.damping_bounds,
            gamma_every=self.gamma_every if self.adaptive_gamma else 0,
            gamma_factor=self.adapt_rate**self.gamma_every,
        )

    def damped(self, damping: float) -> KFAC:
        """This method with lambda + eta, or gamma^2, in place of lambda."""
        return replace(self, damping=damping)

    def base_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """SGD with momentum; without, and lr 1, where the quadratic model gives the whole update."""
        if self.quadratic_model:
            return torch.optim.SGD(parameters, lr=1.0)
        return super().base_optimizer(parameters)

    @property
    def keeps_eigenvectors(self) -> bool:
        """Whether the state holds eigenvectors, and lambda is added when they are applied."""
        return self.damping_rule == "tikhonov" and self.damping > 0

    def init(self, match: LayerMatch, *, dtype: torch.dtype, device: torch.device) -> State:
        """Zero factors (the moving average is bias-corrected) and identity inverses, or identity bases."""
        shapes = factor_shapes(match)
        state = zeros(shapes, dtype=dtype, device=device)
        for name in ("F",) if match.structure == "block" else ("A", "G"):
            sizes = shapes[name]
            if name == "F" or not self.keeps_eigenvectors:
                state[f"{name}_inverse"] = identity(sizes, dtype=dtype, device=device)
                continue
            state[f"{name}_eigenvalues"] = torch.ones(sizes[:2], dtype=dtype, device=device)
            if len(sizes) > 1:
                state[f"{name}_basis"] = identity(sizes, dtype=dtype, device=device)
        return state

    def refresh(
        self, states: Mapping[str, State], *, counts: Mapping[str, int]
    ) -> tuple[dict[str, State], Refreshed]:
        """Damped inverses, or eigenvectors, of all factors; equal sizes in one batched call."""
        return self.refreshed(states, damping=self.damping)

    def refreshed(
        self, states: Mapping[str, State], *, damping: float | Tensor
    ) -> tuple[dict[str, State], Refreshed]:
        """What `refresh` returns, for this lambda: a number or a 0-dim tensor, positive if the setting is."""
        new, rest = inverted_blocks(self._rule, damping, states)
        sides = {key: self.sides(state) for key, state in rest.items()}
        if self.keeps_eigenvectors:
            changed, refreshed = decomposed(sides, rest)
        else:
            pairs = {key: self.dampings(state, damping) for key, state in rest.items()}
            changed, refreshed = inverted(sides, pairs, rest, undamped=self.damping == 0)
        return new | changed, refreshed

    def sides(self, state: State) -> tuple[Tensor, Tensor]:
        """The factors that are inverted, (A, G); for a tied weight those of both orientations together."""
        return joined_sides(state)

    def dampings(self, state: State, damping: float | Tensor) -> tuple[Tensor, Tensor]:
        """What the rule adds to A and to G, [groups] each."""
        return paired_dampings(self._rule, damping, *self.scales(state))

    @property
    def _rule(self) -> str:
        """The rule; without damping all agree, and "factored" adds nothing."""
        return self.damping_rule if self.damping > 0 else "factored"

    def scales(self, state: State) -> tuple[Tensor, Tensor]:
        """What the damping rule reads of A and of G, [groups] each."""
        a, g = self.sides(state)
        return scale(self.damping_rule, a), scale(self.damping_rule, g)

    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        """V = G^-1 grad A^-1; for blocks F^-1 grad per channel."""
        if "F_inverse" in state:
            return solved_blocks(state["F_inverse"], gradient)
        if "G_basis" in state:
            eigenvalues = outer(state["G_eigenvalues"], state["A_eigenvalues"])
            return solved_in_basis(state, gradient, eigenvalues + self.damping)
        return two_sided(state["G_inverse"], gradient, state["A_inverse"])

    def rescale(
        self, directions: list[Tensor], gradients: list[Tensor], *, learning_rates: Tensor
    ) -> list[Tensor]:
        """KL clip (rule C1 of methods.md 1.8); as they are for the quadratic model."""
        if self.quadratic_model:
            return directions
        return super().rescale(directions, gradients, learning_rates=learning_rates)

    def _rotates(self, match: LayerMatch) -> bool:
        return self.keeps_eigenvectors and match.structure != "block"

    def refresh_flops(self, match: LayerMatch, side: str) -> int:
        """Cholesky inverse d^3, or eigenvectors 9 d^3."""
        if self._rotates(match):
            return eigen_flops(factor_shapes(match)[side])
        return super().refresh_flops(match, side)

    def apply_flops(self, match: LayerMatch, side: str) -> int:
        """2 d^2 times the other side; twice that with eigenvectors."""
        return rotation_flops(match, side) if self._rotates(match) else super().apply_flops(match, side)


def joined_sides(state: State) -> tuple[Tensor, Tensor]:
    """(A, G); for a tied weight those of both orientations together."""
    sides = state["A"], state["G"]
    if "A_swapped" in state:
        return join_orientations(*sides, state["A_swapped"], state["G_swapped"])
    return sides


def solved_blocks(inverse: Tensor, gradient: Tensor) -> Tensor:
    """F^-1 grad per channel. inverse: [channels, k, k]; gradient: [channels, k]."""
    return (inverse @ gradient.to(inverse.dtype).unsqueeze(-1)).squeeze(-1)
