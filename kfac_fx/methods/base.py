"""What Kronecker-factored methods have in common: settings, factors A and G, moving average, lengths, costs.

A method derives from `KroneckerFactored` and overrides what differs. Formulas: methods.md section 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kfac_fx.contracts import Statistics
from kfac_fx.types import FactorSpec, LayerMatch, State


@dataclass(frozen=True, kw_only=True)
class KroneckerFactored:
    """Settings that all methods share, and the behaviour of factors A and G under rule E1 of methods.md 1.5.

    decay: weight of the old average per statistics update. statistics_every, inverse_every: steps.
    max_factor_dim: larger layers are left to the optimizer.
    paper, stored, costs: for the table of `kfac-fx methods`. What the state of a layer holds and its number
    of elements; FLOPs of statistics, refresh and apply each time they run: in d_A, d_G, rows n and columns m
    (methods.md 16.6), for the default settings.
    """

    decay: float = 0.95
    statistics_every: int = 1
    inverse_every: int = 10
    max_factor_dim: int = 8192

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    stored: ClassVar[str] = ""
    costs: ClassVar[tuple[str, str, str]] = ("", "", "")
    shared_names: ClassVar[frozenset[str]] = frozenset({"A"})
    growing_names: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Refuse values without meaning, by name."""
        least = {"statistics_every": 1, "inverse_every": 0 if self.inverse_free else 1, "max_factor_dim": 1}
        for name, bound in least.items():
            self._check(name, getattr(self, name) >= bound, f"must be at least {bound}")
        self._check("decay", 0 <= self.decay <= 1, "must lie in [0, 1]")
        damping = getattr(self, "damping", 0.0)
        self._check("damping", 0 <= damping < math.inf, "must be finite and not negative")

    @property
    def inverse_free(self) -> bool:
        """Whether the method has nothing to refresh."""
        return False

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
            "A_swapped": partial(statistics.input_moment, swapped=True),
            "G_swapped": partial(statistics.output_moment, swapped=True),
        }
        return {name: read[name]() for name in names}

    def join(self, name: str, first: Tensor, second: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        """Second moments are linear."""
        return weights[0] * first + weights[1] * second

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
        """As they are."""
        return directions


def averaged(old: Tensor, new: Tensor, weight: Tensor) -> Tensor:
    """(1 - weight) old + weight new; the old where the result would not be finite."""
    mixed = torch.lerp(old, new, weight.to(new.dtype))
    return torch.where(torch.isfinite(mixed).all(), mixed, old)


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
    """
    half = output_inverse @ gradient.to(output_inverse.dtype)
    return half * input_inverse if input_inverse.dim() == 1 else half @ input_inverse


def factor_shapes(match: LayerMatch) -> dict[str, tuple[int, ...]]:
    """Shapes of A and G (and of the swapped ones of a tied weight), or of F."""
    if match.structure == "block":
        k = 1 if match.bias is None else 2
        return {"F": (match.groups, k, k)}
    a = (match.d_in,) if match.structure == "diagonal" else (match.groups, match.d_in, match.d_in)
    shapes = {"A": a, "G": (match.groups, match.d_out, match.d_out)}
    if match.tied:
        shapes |= {"A_swapped": shapes["G"], "G_swapped": a}
    return shapes


def zeros(
    shapes: Mapping[str, Sequence[int]], *, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Zero tensors of these shapes."""
    return {name: torch.zeros(tuple(sizes), dtype=dtype, device=device) for name, sizes in shapes.items()}


def identity(sizes: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Identity matrices [batch, d, d], or ones [d]."""
    if len(sizes) == 1:
        return torch.ones(tuple(sizes), dtype=dtype, device=device)
    return torch.eye(sizes[-1], dtype=dtype, device=device).repeat(sizes[0], 1, 1)


def spec(
    method: Any,
    match: LayerMatch,
    side: str,
    *,
    dtype: torch.dtype,
    statistics: int,
    refresh: int,
    apply: int,
    form: str | None = None,
    columns: int | None = None,
) -> FactorSpec:
    """The record of one side. Its bytes are those of the tensors that `init` allocates under names that start
    with `side`; what `shared_names` leaves to another layer counts there.

    statistics, refresh, apply: FLOPs each time the phase runs. A shared statistic costs its owner alone, and
    so does a refresh if all that it changes is shared.
    """
    state = method.init(match, dtype=dtype, device=torch.device("meta"))
    borrowed = match.shared_a if side == "A" and match.shared_a != match.key else None
    owned = [
        t for n, t in state.items() if n.startswith(side) and not (borrowed and n in method.shared_names)
    ]
    sizes = factor_shapes(match).get(side, (match.groups, match.d_out, match.d_in))
    diagonal = len(sizes) == 1
    return FactorSpec(
        owner=match.key,
        side=side,  # type: ignore[arg-type]
        dim=sizes[0] if diagonal else sizes[1],
        count=1 if diagonal else sizes[0],
        diagonal=diagonal,
        dtype=dtype,
        bytes=sum(t.numel() * t.dtype.itemsize for t in owned),
        flops_statistics=0 if borrowed and side in method.shared_names else statistics,
        flops_refresh=refresh if owned else 0,
        flops_apply=apply,
        form=form or statistics_form(match, side),
        shared_with=borrowed if borrowed and side in method.shared_names else None,
        columns=columns,
    )


def statistics_form(match: LayerMatch, side: str) -> str:
    """How a second moment is computed, in words."""
    if side == "F":
        return "products per example"
    if side == "A" and match.structure == "diagonal":
        return "counts"
    if side == "A" and match.kind.startswith("conv"):
        return "patches^T patches"
    return "rows^T rows"


def moment_flops(match: LayerMatch, side: str) -> int:
    """FLOPs of one batch's second moment: 2 rows d^2 per group; counts are one each."""
    if side == "F":
        return match.rows * 2 * match.groups * (1 if match.bias is None else 4)
    per_group = match.rows // match.groups if match.kind == "gathered-experts" else match.rows
    if side == "A" and match.structure == "diagonal":
        return match.rows
    passes = 1 if side == "A" else match.num_passes
    return passes * per_group * 2 * match.groups * (match.d_in if side == "A" else match.d_out) ** 2


def apply_flops(match: LayerMatch, side: str) -> int:
    """FLOPs of applying one dense side to the gradient: 2 d^2 times the other side."""
    if side == "F":
        return match.groups * (2 if match.bias is None else 8)
    if side == "A" and match.structure == "diagonal":
        return match.d_in * match.d_out
    d = match.d_in if side == "A" else match.d_out
    return 2 * match.groups * d * match.d_in * match.d_out
