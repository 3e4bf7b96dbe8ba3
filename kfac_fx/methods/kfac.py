"""K-FAC with KFC's factors for convolutions: moving averages, factored Tikhonov damping, Cholesky, KL clip.

Martens & Grosse 2015 (arXiv:1503.05671); Grosse & Martens 2016 (arXiv:1602.01407); expand and reduce weight
sharing of Eschenhagen et al. 2023 (arXiv:2311.00636). Formulas: methods.md sections 1 to 3 and 16.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor, nn

from kfac_fx.contracts import Statistics
from kfac_fx.linalg import damped_inverses, join_orientations, mean_eigenvalue, pi_ratio, small_inverse
from kfac_fx.types import FactorSpec, LayerMatch, Refreshed, State


@final
@dataclass(frozen=True, kw_only=True)
class KFAC:
    """Kronecker-factored approximate curvature.

    damping: lambda, in units of the Hessian of the loss that is minimised (of the MEAN loss for mean losses).
    decay: weight of the old average per statistics update. statistics_every, inverse_every: steps. kl_clip:
    bound on lr^2 <V, grad>, None for no bound. pi: balance the damping by the factors' traces.
    max_factor_dim: larger layers are left to the optimizer.
    """

    damping: float = 0.03
    decay: float = 0.95
    statistics_every: int = 1
    inverse_every: int = 10
    kl_clip: float | None = 1e-3
    pi: bool = True
    max_factor_dim: int = 8192

    def __post_init__(self) -> None:
        """Refuse values without meaning, by name."""
        for name in ("statistics_every", "inverse_every", "max_factor_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"KFAC({name}={getattr(self, name)}): must be at least 1.")
        if not 0 <= self.damping < math.inf:
            raise ValueError(f"KFAC(damping={self.damping}): must be finite and not negative.")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"KFAC(decay={self.decay}): must lie in [0, 1].")
        if self.kl_clip is not None and not self.kl_clip > 0:
            raise ValueError(f"KFAC(kl_clip={self.kl_clip}): must be positive, or None for no clipping.")

    @property
    def name(self) -> str:
        """The method's name on the command line."""
        return "kfac"

    @property
    def shared_names(self) -> frozenset[str]:
        """A depends on the input alone; its inverse does not, since pi reads G."""
        return frozenset({"A"})

    def base_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """SGD with momentum, as in the common implementations."""
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)

    def statistics_names(self, match: LayerMatch) -> tuple[str, ...]:
        """F for block structures, else A and G; of both orientations for a tied weight."""
        if match.structure == "block":
            return ("F",)
        return ("A", "G", "A_swapped", "G_swapped") if match.tied else ("A", "G")

    def init(self, match: LayerMatch, *, dtype: torch.dtype, device: torch.device) -> State:
        """Zero factors (the moving average is bias-corrected) and identity inverses."""
        shapes = _shapes(match)
        state = {name: torch.zeros(sizes, dtype=dtype, device=device) for name, sizes in shapes.items()}
        if match.tied:
            for name, side in (("A_swapped", "G"), ("G_swapped", "A")):
                state[name] = torch.zeros(shapes[side], dtype=dtype, device=device)
        for name, sizes in shapes.items():
            identity = torch.ones(sizes, dtype=dtype, device=device)
            if len(sizes) == 3:
                identity = torch.eye(sizes[-1], dtype=dtype, device=device).repeat(sizes[0], 1, 1)
            state[f"{name}_inverse"] = identity
        return state

    def batch_statistics(self, statistics: Statistics, names: Sequence[str]) -> State:
        """A and G, or F, of one batch."""
        read = {
            "A": statistics.input_moment,
            "G": statistics.output_moment,
            "F": statistics.blocks,
            "A_swapped": partial(statistics.input_moment, swapped=True),
            "G_swapped": partial(statistics.output_moment, swapped=True),
        }
        return {name: read[name]() for name in names}

    def moving_average(self, state: State, batch: State, *, weight: Tensor) -> State:
        """(1 - weight) old + weight new (rule E1 of methods.md 1.5).

        A batch that is not finite leaves the old.
        """
        averaged = {}
        for name, new in batch.items():
            mixed = torch.lerp(state[name], new, weight.to(new.dtype))
            averaged[name] = torch.where(torch.isfinite(mixed).all(), mixed, state[name])
        return averaged

    def new_weight(self, count: int) -> float:
        """1 / (1 + decay + ... + decay^count): the weights of all batches so far sum to one."""
        if self.decay == 1:
            return 1.0 / (count + 1)
        return (1.0 - self.decay) / (1.0 - self.decay ** (count + 1))

    def refresh(self, states: Mapping[str, State]) -> tuple[dict[str, State], Refreshed]:
        """Damped inverses of all factors, equal sizes in one batched call."""
        new: dict[str, State] = {key: {} for key in states}
        places, factors, dampings, last = [], [], [], []
        for key, state in states.items():
            if "F" in state:
                new[key]["F_inverse"] = small_inverse(state["F"], self.damping)
                continue
            sides = state["A"], state["G"]
            if "A_swapped" in state:
                sides = join_orientations(*sides, state["A_swapped"], state["G_swapped"])
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
            inverse = state["F_inverse"]
            return (inverse @ gradient.to(inverse.dtype).unsqueeze(-1)).squeeze(-1)
        a, g = state["A_inverse"], state["G_inverse"]
        half = g @ gradient.to(g.dtype)
        return half * a if a.dim() == 1 else half @ a

    def rescale(
        self, directions: list[Tensor], gradients: list[Tensor], *, learning_rates: Tensor
    ) -> list[Tensor]:
        """KL clip.

        Nu = min(1, sqrt(kappa / |sum lr^2 <V, grad>|)) for all layers (rule C1 of methods.md 1.8).
        """
        if self.kl_clip is None or not directions:
            return directions
        products = [(v * g.to(v.dtype)).sum() for v, g in zip(directions, gradients, strict=True)]
        total = (torch.stack(products) * learning_rates.to(products[0].dtype) ** 2).sum().abs()
        tiny = torch.finfo(total.dtype).tiny
        nu = torch.sqrt(self.kl_clip / total.clamp(min=tiny)).clamp(max=1.0)
        return [v * nu for v in directions]

    def factors(self, match: LayerMatch, *, dtype: torch.dtype) -> tuple[FactorSpec, ...]:
        """Size and cost of each stored factor.

        Statistics 2 rows d^2, Cholesky inverse d^3, apply 2 d^2 times the other side.
        """
        shapes = _shapes(match)
        return tuple(_spec(match, name, shapes[name], dtype) for name in shapes)


def _shapes(match: LayerMatch) -> dict[str, tuple[int, ...]]:
    if match.structure == "block":
        k = 1 if match.bias is None else 2
        return {"F": (match.groups, k, k)}
    a = (match.d_in,) if match.structure == "diagonal" else (match.groups, match.d_in, match.d_in)
    return {"A": a, "G": (match.groups, match.d_out, match.d_out)}


def _spec(match: LayerMatch, name: str, sizes: tuple[int, ...], dtype: torch.dtype) -> FactorSpec:
    diagonal = len(sizes) == 1
    count, dim = (1, sizes[0]) if diagonal else sizes[:2]
    shared = match.shared_a if name == "A" and match.shared_a != match.key else None
    elements = 1
    for size in sizes:
        elements *= size
    other = {"A": match.d_out, "G": match.d_in, "F": 1}[name]
    rows = match.rows // (1 if name == "F" else match.groups if match.kind == "gathered-experts" else 1)
    refresh = 2 * elements if diagonal else count * dim**3
    return FactorSpec(
        owner=match.key,
        side=name,  # type: ignore[arg-type]
        dim=dim,
        count=count,
        diagonal=diagonal,
        dtype=dtype,
        bytes=elements * dtype.itemsize * (3 if match.tied else 2),
        flops_statistics=0 if shared else rows * (1 if diagonal else 2 * count * dim * dim),
        flops_refresh=refresh,
        flops_apply=elements * other * (1 if diagonal else 2),
        form=_form(match, name),
        shared_with=shared,
    )


def _form(match: LayerMatch, name: str) -> str:
    if name == "F":
        return "products per example"
    if name == "A" and match.structure == "diagonal":
        return "counts"
    if name == "A" and match.kind.startswith("conv"):
        return "patches^T patches"
    return "rows^T rows"
