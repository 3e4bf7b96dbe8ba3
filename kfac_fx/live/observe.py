"""From what a step keeps to its `StepReport`. Reads values on the host, and changes nothing.

Enters: captures, progress, journal. Leaves: the record.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import torch

from kfac_fx.captures import Captures
from kfac_fx.contracts import Method
from kfac_fx.errors import UnknownNameError, did_you_mean
from kfac_fx.live.health import LayerHealth, factor_health
from kfac_fx.live.journal import Journal
from kfac_fx.live.records import KL, StepReport
from kfac_fx.live.text import render
from kfac_fx.live.views import View, views
from kfac_fx.methods.base import KroneckerFactored
from kfac_fx.planned import Plan
from kfac_fx.progress import Progress
from kfac_fx.report.rows import fits, forward_order, layer_labels, layer_rows
from kfac_fx.stages import runs
from kfac_fx.types import LayerMatch, State

KINDS = ("plain", "statistics", "refresh", "first run")


@final
@dataclass(frozen=True, kw_only=True)
class Damping:
    """Lambda, gamma and the reduction ratio of the next step. of_factors: lambda as factors are damped with
    it: lambda + eta or gamma^2 where those are adapted.
    """

    value: float | None
    of_factors: float
    gamma: float | None = None
    ratio: float | None = None

    @staticmethod
    def of(method: Method, progress: Progress) -> Damping:
        """As the method has it, or as it was adapted."""
        value = method.damping if isinstance(method, KroneckerFactored) else None
        if progress.quadratic is None:
            return Damping(value=value, of_factors=value or 0.0)
        strength = progress.quadratic.strength
        squared = strength.gamma_squared
        return Damping(
            value=strength.damping,
            of_factors=strength.of_model if squared is None else squared,
            gamma=progress.gamma,
            ratio=strength.ratio,
        )


@torch.no_grad()
def observe(
    method: Method,
    captures: Captures,
    progress: Progress,
    journal: Journal,
    *,
    layers: str,
    max_dim: int,
) -> StepReport:
    """The report of now.

    layers: pattern (fnmatch) of the module paths or weights whose factors are looked at. max_dim: larger
    factors are left out. Raises `UnknownNameError` if no layer fits.
    """
    damping, outcomes = Damping.of(method, progress), progress.curvature.outcomes
    found = _layers(method, captures, progress, journal, damping, layers=layers, max_dim=max_dim)
    left_out = [e.name for e in found if any(f.dim > max_dim and f.effective_rank is None for f in e.factors)]
    kl, kl_note = _kl(method, captures, progress, journal)
    return StepReport(
        method=method.name,
        steps=progress.steps,
        losses=tuple(float(loss) for loss in journal.losses),
        damping=damping.value,
        gamma=damping.gamma,
        reduction_ratio=damping.ratio,
        kl=kl,
        kl_note=kl_note,
        retried=int(outcomes.retried),
        kept_last=int(outcomes.kept_last),
        kinds=tuple(journal.kinds[name].read(name) for name in KINDS if name in journal.kinds),
        phases=tuple(times.read(name) for name, times in journal.phases.items()),
        layers=tuple(found),
        left_out=tuple(left_out),
        max_dim=max_dim,
        state_bytes=_bytes(progress.curvature.state_dict()["curvature"].values(), set()),
        render=render,
    )


def _layers(
    method: Method,
    captures: Captures,
    progress: Progress,
    journal: Journal,
    damping: Damping,
    *,
    layers: str,
    max_dim: int,
) -> list[LayerHealth]:
    """The layers that fit the pattern, in the order of the forward."""
    curvature, counted = progress.curvature, set[int]()
    known: dict[int, tuple[View, torch.Tensor]] = {}
    found = []
    for match, name, group in _chosen(captures.plans, layers):
        seen = views(method, curvature.state(match.key), damping.of_factors)
        at = journal.refreshed.get(match.key)
        found.append(
            LayerHealth(
                name=name,
                key=match.key,
                group=group,
                statistics=curvature.statistics.get(match.key, 0),
                refreshes=curvature.refreshes.get(match.key, 0),
                since_refresh=None if at is None else progress.steps - at,
                state_bytes=_bytes([curvature.state(match.key)], counted),
                factors=tuple(factor_health(view, max_dim=max_dim, known=known) for view in seen),
            )
        )
    return found


def _chosen(plans: list[Plan], pattern: str) -> list[tuple[LayerMatch, str, str]]:
    """(layer, its name, the name of its group) of all layers that fit."""
    found: dict[str, tuple[LayerMatch, str, str]] = {}
    names: list[str] = []
    for plan in plans:
        labels = layer_labels(plan)
        names += labels.values()
        chosen = [m for m in forward_order(plan) if m.key not in found and fits(m, labels, pattern)]
        for row in layer_rows(plan, chosen, collapse=True):
            found |= {match.key: (match, labels[match.key], row.label) for match in row.members}
        found |= {m.key: found[m.key] for m in chosen}
    if plans and not found and names and pattern != "*":
        raise UnknownNameError(f"no layer fits {pattern!r}.{did_you_mean(pattern, names)}")
    return list(found.values())


def _bytes(states: Iterable[State], counted: set[int]) -> int:
    """Of the tensors that were not counted yet."""
    total = 0
    for tensor in (tensor for state in states for tensor in state.values()):
        if id(tensor) not in counted:
            counted.add(id(tensor))
            total += tensor.numel() * tensor.element_size()
    return total


def _kl(method: Method, captures: Captures, progress: Progress, journal: Journal) -> tuple[KL | None, str]:
    """Of the last update, or why it is not known."""
    if progress.quadratic is not None:
        return None, "the quadratic model sets the length of the update"
    if journal.length is None:
        return None, _why_unknown(captures.plans)
    length = abs(journal.length.value())
    bound = method.kl_clip if isinstance(method, KroneckerFactored) else None
    if bound is None or not journal.length.bounded:
        return KL(value=length, clip=None, step=journal.length.step), ""
    # Clipped, lr^2 <V, grad> is nu T with nu^2 T = bound, so nu = bound / (nu T); else it is T itself.
    clip = 1.0 if length <= bound else bound / length
    return KL(value=clip * length, clip=clip, step=journal.length.step), ""


def _why_unknown(plans: list[Plan]) -> str:
    for name in ("precondition", "products"):
        if any(not runs(name, plan.without) for plan in plans):
            return f"the pass {name!r} is off"
    if plans and not any(plan.matched for plan in plans):
        return "no layer is preconditioned"
    return "known from the next step"
