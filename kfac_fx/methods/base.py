"""What Kronecker-factored methods have in common: settings, factors A and G, moving average, lengths, costs.

A method derives from `KroneckerFactored` and overrides what differs. Formulas: methods.md section 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar, get_type_hints

import torch
from torch import Tensor, nn

from kfac_fx.contracts import Statistics
from kfac_fx.layout import lies_transposed
from kfac_fx.methods.costs import factor_shapes, inverse_flops, moment_flops, product_flops, spec
from kfac_fx.types import FactorSpec, LayerMatch, State


@dataclass(frozen=True, kw_only=True)
class KroneckerFactored:
    """Settings that all methods share, and the behaviour of factors A and G under rule E1 of methods.md 1.5.

    decay: weight of the old average per statistics update. statistics_every, inverse_every: steps.
    max_factor_dim: larger layers are left to the optimizer. statistics_precision: "full", or "bfloat16": of
    rows a and g rounded to bfloat16, with sums and factors in float32, as tensor cores of CUDA multiply them
    (elsewhere in float32, which is no faster); blocks of scales and shifts stay full.
    paper, stored, costs: for the table of `kfac-fx methods`. What the state of a layer holds and its number
    of elements; FLOPs of statistics, refresh and apply each time they run: in d_A, d_G, rows n and columns m
    (methods.md 16.6), for the default settings.
    """

    decay: float = 0.95
    statistics_every: int = 1
    inverse_every: int = 10
    max_factor_dim: int = 8192
    statistics_precision: str = "full"

    damping: ClassVar[float] = 0.0
    kl_clip: ClassVar[float | None] = None
    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    stored: ClassVar[str] = ""
    costs: ClassVar[tuple[str, str, str]] = ("", "", "")
    shared_names: ClassVar[frozenset[str]] = frozenset({"A"})
    growing_names: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Refuse values of another type or without meaning, by name."""
        hints = _hints(type(self))
        for field in fields(self):
            fits, rule = _typed(getattr(self, field.name), hints[field.name], default=field.default)
            self._check(field.name, fits, rule)
        if type(self).inverse_every == 0:
            self._check("inverse_every", self.inverse_every == 0, "must be 0, since nothing is inverted")
        self._check("decay", 0 <= self.decay <= 1, "must lie in [0, 1]")
        self._check("damping", 0 <= self.damping < math.inf, "must be finite and not negative")
        known = self.statistics_precision in ("full", "bfloat16")
        self._check("statistics_precision", known, "must be 'full' or 'bfloat16'")
        clips = self.kl_clip is None or self.kl_clip > 0
        self._check("kl_clip", clips, "must be positive, or None for no clipping")

    def _check(self, name: str, holds: bool, rule: str) -> None:
        """Raise `ValueError` that names the setting."""
        if not holds:
            raise ValueError(f"{type(self).__name__}({name}={getattr(self, name)!r}): {rule}.")

    def base_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """SGD with momentum, as in the common implementations."""
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)

    def refuses(self, match: LayerMatch) -> str | None:
        """Nothing."""
        return None

    def statistics_names(self, match: LayerMatch) -> tuple[str, ...]:
        """F for block structures, else A and G; of both orientations for a tied weight."""
        if match.structure == "block":
            return ("F",)
        return ("A", "G", "A_swapped", "G_swapped") if match.tied else ("A", "G")

    def batch_statistics(self, statistics: Statistics, names: Sequence[str], state: State) -> State:
        """A and G, or F, of one batch."""
        read = {
            "A": statistics.input_moment,
            "G": statistics.output_moment,
            "F": statistics.blocks,
            "A_swapped": functools.partial(statistics.input_moment, swapped=True),
            "G_swapped": functools.partial(statistics.output_moment, swapped=True),
        }
        return {name: read[name]() for name in names}

    def join(self, name: str, first: Tensor, second: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        """Second moments are linear."""
        return weights[0] * first + weights[1] * second

    def mean_over(self, match: LayerMatch, name: str) -> int:
        """Examples where positions are averaged first, else rows."""
        averaged_first = match.sharing == "reduce" and match.structure == "kronecker"
        return match.examples if averaged_first else match.rows

    def fold(self, state: State, batch: State, *, weight: Tensor, inverse_scale: Tensor) -> State:
        """(1 - weight) old + weight new.

        A batch that is not finite leaves the old.
        """
        return {name: averaged(state[name], new, weight) for name, new in batch.items()}

    def new_weight(self, count: int) -> float:
        """1 / (1 + decay + ... + decay^count): the weights of all batches so far sum to one."""
        if self.decay == 1:
            return 1.0 / (count + 1)
        return (1.0 - self.decay) / (1.0 - self.decay ** (count + 1))

    def rescale(
        self, directions: list[Tensor], gradients: list[Tensor], *, learning_rates: Tensor
    ) -> list[Tensor]:
        """KL clip, where the method has one (rule C1 of methods.md 1.8)."""
        return kl_clipped(directions, gradients, learning_rates=learning_rates, bound=self.kl_clip)

    def factors(self, match: LayerMatch, *, dtype: torch.dtype) -> tuple[FactorSpec, ...]:
        """One record for each of `kept_sides`, with the FLOPs of the three hooks below."""
        return tuple(
            spec(
                self,
                match,
                side,
                dtype=dtype,
                statistics=self.statistics_flops(match, side),
                refresh=self.refresh_flops(match, side),
                apply=self.apply_flops(match, side),
            )
            for side in self.kept_sides(match)
        )

    def kept_sides(self, match: LayerMatch) -> tuple[str, ...]:
        """F for block structures, else A and G."""
        return ("F",) if match.structure == "block" else ("A", "G")

    def statistics_flops(self, match: LayerMatch, side: str) -> int:
        """Second moments: 2 rows d^2."""
        return moment_flops(match, side)

    def refresh_flops(self, match: LayerMatch, side: str) -> int:
        """Inverses through Cholesky: d^3."""
        return inverse_flops(factor_shapes(match)[side])

    def apply_flops(self, match: LayerMatch, side: str) -> int:
        """Dense inverses: 2 d^2 times the other side."""
        return product_flops(match, side)


_hints = functools.cache(get_type_hints)


def _typed(value: Any, hint: Any, *, default: Any) -> tuple[bool, str]:
    """Whether a setting's value is of its annotated type, and the rule in words; other types are not checked.

    A bool is no number. A whole number is at least 1, or 0 where that is the default.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    least = 0 if default == 0 else 1
    whole = number and isinstance(value, Integral) and int(value) >= least
    pair = isinstance(value, tuple) and [_typed(v, float, default=1)[0] for v in value] == [True, True]
    rules = {
        int: (whole, f"must be a whole number of at least {least}"),
        float: (number, "must be a number"),
        float | None: (number or value is None, "must be a number or None"),
        bool: (isinstance(value, bool), "must be True or False"),
        tuple[float, float]: (pair, "must be a tuple of two numbers"),
    }
    return rules.get(hint, (True, ""))


def averaged(old: Tensor, new: Tensor, weight: Tensor) -> Tensor:
    """(1 - weight) old + weight new; the old where the result would not be finite."""
    mixed = torch.lerp(old, new, weight.to(new.dtype))
    return torch.where(all_finite(mixed), mixed, old)


def all_finite(tensor: Tensor) -> Tensor:
    """Whether all entries are: 0-dim bool.

    The extremes are finite if and only if all entries are, and take no longer than a sum, which can overflow.
    """
    return torch.isfinite(torch.stack(torch.aminmax(tensor))).all()


def kl_clipped(
    directions: list[Tensor], gradients: list[Tensor], *, learning_rates: Tensor, bound: float | None
) -> list[Tensor]:
    """Nu = min(1, sqrt(bound / |sum lr^2 <V, grad>|)) for all layers: rule C1 of methods.md 1.8."""
    if bound is None or not directions:
        return directions
    products = [(v * g.to(v.dtype)).sum() for v, g in zip(directions, gradients, strict=True)]
    total = (torch.stack(products) * learning_rates.to(products[0].dtype) ** 2).sum().abs()
    nu = torch.sqrt(bound / total.clamp(min=torch.finfo(total.dtype).tiny)).clamp(max=1.0)
    return [v * nu for v in directions]


def norm_recovered(directions: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """V ||grad||_F / (||V||_F + 1e-12) per layer, weight and bias jointly: rule C2 of methods.md 1.8."""
    return [
        v * (torch.linalg.vector_norm(g.to(v.dtype)) / (torch.linalg.vector_norm(v) + 1e-12))
        for v, g in zip(directions, gradients, strict=True)
    ]


def two_sided(output_inverse: Tensor, gradient: Tensor, input_inverse: Tensor) -> Tensor:
    """G^-1 grad A^-1. gradient: [groups, d_out, d_in]; inverses: matrices per group, or a vector of length
    d_in.

    A gradient that lies transposed in memory (an embedding's, GPT-2's) gives a direction that does too, so
    that later sums and the way back to the parameter read and write memory in order.
    """
    gradient = gradient.to(output_inverse.dtype)
    if lies_transposed(gradient):
        half = gradient.mT @ output_inverse.mT
        if input_inverse.dim() == 1:
            return (half * input_inverse.unsqueeze(-1)).mT
        return (input_inverse.mT @ half).mT
    half = output_inverse @ gradient
    return half * input_inverse if input_inverse.dim() == 1 else half @ input_inverse


def zeros(
    shapes: Mapping[str, Sequence[int]], *, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Zero tensors of these shapes."""
    return {name: torch.zeros(tuple(sizes), dtype=dtype, device=device) for name, sizes in shapes.items()}


def identity(sizes: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Identity matrices [batch, d, d], or ones [d]."""
    if len(sizes) == 1:
        return torch.ones(tuple(sizes), dtype=dtype, device=device)
    if device.type == "meta":  # shapes alone are asked for, and often; diag_embed is slow there
        return torch.empty((*sizes[:-1], sizes[-2]), dtype=dtype, device=device)
    return torch.ones(tuple(sizes[:-1]), dtype=dtype, device=device).diag_embed()
