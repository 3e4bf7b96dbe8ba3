"""NKFAC and AdaNKFAC: Newton steps from the last inverse instead of inversions, and the gradient's lengths.

Sun, Yong & Zhang 2023, ECML-PKDD (no arXiv number; repository myingysun/NKFAC). Formulas: methods.md sections
5, 16.3 and 19. The published code knows linear and 2d convolution layers; groups, experts, embeddings and
tied weights follow the same formulas here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from kfac_fx import host
from kfac_fx.linalg import add_diagonal, alike, join_orientations
from kfac_fx.methods.base import KroneckerFactored, all_finite, identity, norm_recovered, two_sided, zeros
from kfac_fx.methods.costs import factor_shapes
from kfac_fx.methods.damping import diagonal_inverse
from kfac_fx.newton import (
    GUARDS,
    exact_inverse,
    kept_where_not_finite,
    newton_inverse,
    relative_damping,
    symmetrised,
)
from kfac_fx.precision import full_float32
from kfac_fx.types import LayerMatch, Refreshed, State

_TINY = 1e-12


@final
@dataclass(frozen=True, kw_only=True)
class _Job:
    """One factor to invert. exact: by LU, else by Newton steps from `last`."""

    key: str
    side: str
    factor: Tensor
    last: Tensor
    exact: bool


@dataclass(frozen=True, kw_only=True)
class NKFAC(KroneckerFactored):
    """K-FAC with inverses by guarded Newton steps, damping relative to the largest eigenvalue, SGD's lengths.

    decay: weight of the old average per statistics update; the average starts at zero and is not corrected,
    since no scale of a factor matters. damping: of each factor, as a share of its largest eigenvalue.
    damping_floor: least damping, in units of the averaged factors (whose Frobenius norm is at most 1).
    newton_steps: per refresh. exact_every: refreshes between two inversions by LU; the first three are exact
    too, and the next one of a factor whose Newton step was not finite (until then it keeps its inverse).
    guard: the norm that decides on a full step, "frobenius" (published) or "spectral" (does not stall
    where many small errors make a large Frobenius norm; costs 20 products with a vector more per norm).
    """

    decay: float = 0.95
    statistics_every: int = 20
    inverse_every: int = 200
    damping: float = 0.01
    damping_floor: float = 1e-4
    newton_steps: int = 1
    exact_every: int = 500
    guard: str = "frobenius"

    name: ClassVar[str] = "nkfac"
    paper: ClassVar[str] = "Sun, Yong & Zhang 2023 (ECML-PKDD)"
    stored: ClassVar[str] = "A, G and their inverses: 2 (d_A^2 + d_G^2)"
    costs: ClassVar[tuple[str, str, str]] = (
        "2 n (d_A^2 + d_G^2)",
        "4 (d_A^3 + d_G^3) + 40 (d_A^2 + d_G^2)",
        "2 d_A d_G (d_A + d_G)",
    )
    shared_names: ClassVar[frozenset[str]] = frozenset({"A", "A_inverse", "A_kept"})

    def __post_init__(self) -> None:
        """Refuse values without meaning, by name."""
        super().__post_init__()
        self._check("decay", self.decay < 1, "must lie in [0, 1); at 1 the averages would stay zero")
        self._check("damping_floor", 0 <= self.damping_floor < math.inf, "must be finite and not negative")
        self._check("guard", self.guard in tuple(GUARDS), f"must be one of {', '.join(map(repr, GUARDS))}")

    def base_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """SGD with the settings published for CIFAR: weight decay is added after preconditioning."""
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)

    def refuses(self, match: LayerMatch) -> str | None:
        """Scales and shifts, of norms or added like position embeddings: they have no Kronecker factors."""
        if match.structure != "block":
            return None
        return f"{self.name}, as published, leaves scales, shifts and added parameters to the base optimizer"

    def init(self, match: LayerMatch, *, dtype: torch.dtype, device: torch.device) -> State:
        """Zero averages and identity inverses. A tied weight keeps one pair for both orientations.

        A_kept, G_kept: [groups], 1 where the last refresh kept the inverse; none for a diagonal A.
        """
        sizes = {side: factor_shapes(match)[side] for side in ("A", "G")}
        state = zeros(sizes, dtype=dtype, device=device)
        state |= {f"{s}_inverse": identity(shape, dtype=dtype, device=device) for s, shape in sizes.items()}
        flags = {f"{side}_kept": shape[:1] for side, shape in sizes.items() if len(shape) > 1}
        return state | zeros(flags, dtype=dtype, device=device)

    def fold(self, state: State, batch: State, *, weight: Tensor, inverse_scale: Tensor) -> State:
        """Averages move by (1 - decay) (x / (||x||_F + 1e-12) - average), per group (methods.md 5.2).

        A batch that is not finite leaves the old. G is divided by 1/R_, since the published G is the plain
        sum over the gradients of the loss as it is.
        """
        moments = {
            name: moment / inverse_scale.to(moment.dtype) if name.startswith("G") else moment
            for name, moment in batch.items()
        }
        if "A_swapped" in moments:
            moments = dict(zip(("A", "G"), _joined(moments), strict=True))
        share = self.new_weight(0)
        return {name: _averaged(state[name], moment, share) for name, moment in moments.items()}

    def new_weight(self, count: int) -> float:
        """1 - decay, always."""
        return 1.0 - self.decay

    def refresh(
        self, states: Mapping[str, State], *, counts: Mapping[str, int]
    ) -> tuple[dict[str, State], Refreshed]:
        """Approximate inverses of all damped factors; matrices of one size are one batched call.

        Nothing that is computed here is read on the host. What the refresh before has kept is, once, where
        that is allowed; elsewhere it has kept nothing, see `Outcomes.troubled`.
        """
        new: dict[str, State] = {key: {} for key in states}
        groups: dict[bool, list[_Job]] = {True: [], False: []}
        for job in self._jobs(states, counts):
            if job.factor.dim() == 1:
                new[job.key][f"{job.side}_inverse"] = diagonal_inverse(job.factor, self._damping(job.factor))
                continue
            groups[job.exact].append(job)
        total: int | Tensor = 0
        for group, indices in ((g, i) for g in groups.values() for i in alike([job.factor for job in g])):
            jobs = [group[index] for index in indices]
            inverses, kept = self._inverses(jobs)
            total = total + kept.sum()
            sizes = [job.factor.shape[0] for job in jobs]
            for job, inverse, flags in zip(jobs, inverses.split(sizes), kept.split(sizes), strict=True):
                new[job.key] |= {f"{job.side}_inverse": inverse, f"{job.side}_kept": flags.to(inverse.dtype)}
        return new, Refreshed(retried=0, kept_last=total)

    def _jobs(self, states: Mapping[str, State], counts: Mapping[str, int]) -> list[_Job]:
        """Every factor once, also if several layers read it; exact if any of them asks for it."""
        jobs: dict[int, _Job] = {}
        kept = _kept(states)
        for key, state in states.items():
            exact = counts[key] < 3 or counts[key] % self.exact_every == 0
            for side in ("A", "G"):
                factor = state[side]
                earlier = jobs.get(id(factor))
                exact_here = exact or (key, side) in kept or (earlier is not None and earlier.exact)
                owner = key if earlier is None else earlier.key
                jobs[id(factor)] = _Job(
                    key=owner, side=side, factor=factor, last=state[f"{side}_inverse"], exact=exact_here
                )
        return list(jobs.values())

    def _inverses(self, jobs: list[_Job]) -> tuple[Tensor, Tensor]:
        """Inverses of factors of one size, and which kept the last one."""
        factors, last = torch.cat([job.factor for job in jobs]), torch.cat([job.last for job in jobs])
        with full_float32(factors.device):
            damped = add_diagonal(factors, self._damping(factors))
            if jobs[0].exact:
                found = exact_inverse(damped)
            else:
                found = newton_inverse(damped, last, steps=self.newton_steps, guard=self.guard)
        return kept_where_not_finite(symmetrised(found), last)

    def _damping(self, factor: Tensor) -> Tensor:
        return relative_damping(factor, relative=self.damping, floor=self.damping_floor)

    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        """V = G^-1 grad A^-1."""
        return two_sided(state["G_inverse"], gradient, state["A_inverse"])

    def rescale(
        self, directions: list[Tensor], gradients: list[Tensor], *, learning_rates: Tensor
    ) -> list[Tensor]:
        """The length of each layer's gradient (rule C2 of methods.md 1.8)."""
        return norm_recovered(directions, gradients)

    def refresh_flops(self, match: LayerMatch, side: str) -> int:
        """4 d^3 per Newton step and 40 d^2 for the damping: methods.md 5.7."""
        sizes = factor_shapes(match)[side]
        if len(sizes) == 1:
            return 2 * sizes[0]
        d = sizes[1]
        return sizes[0] * (4 * self.newton_steps * d**3 + 40 * d**2)


@dataclass(frozen=True, kw_only=True)
class AdaNKFAC(NKFAC):
    """NKFAC whose preconditioned gradients go to AdamW, with statistics and inverses five times as rare.

    Settings are those of `NKFAC`. The base optimizer has rate 1e-3, that of the paper's AdamW baselines
    (methods.md section 12); the published class has 0.1 in its constructor, an untuned default. It has no
    weight decay, as published: with none, torch's AdamW is the published update (which divides the decay by
    Adam's first bias correction; torch does not).
    """

    statistics_every: int = 100
    inverse_every: int = 1000

    name: ClassVar[str] = "adankfac"

    def base_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW without weight decay."""
        return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def _kept(states: Mapping[str, State]) -> set[tuple[str, str]]:
    """(layer, side) of the factors whose last refresh kept the inverse, with one read on the host.

    None where reading is not allowed: the step allows it after a refresh that kept one.
    """
    flags = {
        (key, side): state[name].amax()
        for key, state in states.items()
        for side in ("A", "G")
        if (name := f"{side}_kept") in state
    }
    first = next(iter(flags.values()), None)
    if first is None or not host.may_read(first.device):
        return set()
    read = torch.stack([flag.to(first) for flag in flags.values()]).tolist()
    return {place for place, value in zip(flags, read, strict=True) if value}


def _joined(moments: State) -> tuple[Tensor, Tensor]:
    """Input and output moment of a tied weight, both orientations together, both free of the loss's scale."""
    g, g_swapped = moments["G"], moments["G_swapped"]
    size = torch.linalg.vector_norm(g) + torch.linalg.vector_norm(g_swapped) + _TINY
    return join_orientations(moments["A"], g / size, moments["A_swapped"], g_swapped / size)


def _averaged(old: Tensor, moment: Tensor, share: float) -> Tensor:
    """Old + share (normalised moment - old); the old where the result would not be finite.

    moment: [groups, d, d], each normalised for itself, or [d].
    """
    dims = (0,) if moment.dim() == 1 else (1, 2)
    norm = torch.linalg.vector_norm(moment, dim=dims, keepdim=True)
    mixed = old + share * (moment / (norm + _TINY) - old)
    return torch.where(all_finite(mixed) & all_finite(norm), mixed, old)
