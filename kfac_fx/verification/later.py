"""Checks of later training steps: the state that is held, and the update that the optimizer is given.

Enters: steps that this library has made, explicit statistics of their batches. Leaves: a check per layer,
and one of the whole model. The directions are also those of the method's own functions, called eagerly with
the state that is held, which is all that is checked where a method has no independent formula.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from kfac_fx.curvature import Curvature
from kfac_fx.lower import execution
from kfac_fx.methods import NKFAC
from kfac_fx.methods.base import KroneckerFactored
from kfac_fx.planned import Plan
from kfac_fx.types import LayerMatch
from kfac_fx.verification.held import Held
from kfac_fx.verification.layers import Evidence, canonical_gradient, explicit_statistics, rows_in_graph
from kfac_fx.verification.newton_steps import newton_checks
from kfac_fx.verification.ours import run_program
from kfac_fx.verification.records import Check
from kfac_fx.verification.schedule import refusal
from kfac_fx.verification.tolerance import Tolerance, compared, distance, joined
from kfac_fx.verification.training import Ran, Stopped, newton_count
from kfac_fx.verification.update import rescaled

NAME = "later steps"


def later_checks(
    evidence: Evidence, ran: list[Ran], stopped: Stopped | None
) -> tuple[dict[str, Check], Check]:
    """(by key of the layer, of the whole model). evidence: of the first step, with its factors."""
    plan = evidence.ours.plan
    why = refusal(plan.method)
    if why:
        missing = Check(name=NAME, reason=why)
        return {match.key: missing for match in plan.matched}, missing
    held = _after_first(evidence)
    found: dict[str, list[Check]] = {match.key: [] for match in plan.matched}
    whole: list[Check] = []
    for one in ran:
        for match in plan.matched:
            found[match.key] += _state_checks(match, held[match.key], one, evidence)
        for key, checks in _direction_checks(held, one, evidence).items():
            found[key] += checks
        without = [key for key, own in held.items() if own.reason]
        if without and one.kind != "plain":
            for key, checks in _eager_state_checks(without, one, evidence).items():
                found[key] += checks
        whole += _whole_checks(plan, one, evidence.tolerance)
    if stopped is not None:
        whole.append(_stop_check(stopped))
    by_layer = {}
    for key, checks in found.items():
        reason = held[key].reason or ("" if stopped is None else stopped.reason)
        rest = [Check(name="formula" if held[key].reason else "steps", reason=reason)] if reason else []
        by_layer[key] = joined(NAME, [*checks, *rest])
    return by_layer, joined(NAME, whole)


def _stop_check(stopped: Stopped) -> Check:
    if stopped.violated:
        return Check(name="steps", error=math.inf, detail=stopped.reason)
    return Check(name="steps", reason=stopped.reason)


def _after_first(evidence: Evidence) -> dict[str, Held]:
    """Each layer after the first step, which has refreshed."""
    ours, held = evidence.ours, {}
    for match in ours.plan.matched:
        own, factors = Held(ours.plan.method, match), evidence.factors[match.key]
        statistics = {"statistics": factors} if isinstance(factors, str) else factors
        own.fold(statistics, ours.before[match.key], scale=float(ours.statistics.inverse_scale))
        own.refresh(newton=False)
        held[match.key] = own
    return held


def _state_checks(match: LayerMatch, own: Held, one: Ran, evidence: Evidence) -> list[Check]:
    """Averages after the batch; of a refresh by Newton steps its inverses."""
    if one.values is None or own.reason:
        return []
    plan, before, after = evidence.ours.plan, one.before[match.key], one.after[match.key]
    here = Evidence(
        plain=one.plain, observed=None, ours=evidence.ours, values=one.values, tolerance=evidence.tolerance
    )
    scale = float(one.values[plan.capture.inverse_scale])
    rows = rows_in_graph(match, one.values)
    own.fold(explicit_statistics(match, rows, here, scale=scale, state=before), before, scale=scale)
    if own.reason:
        return []
    checks = own.checks(after, one.told, evidence.tolerance) if one.kind == "statistics" else []
    if one.kind != "refresh":
        return checks
    method = plan.method
    newton = isinstance(method, NKFAC) and newton_count(method) % method.exact_every != 0
    own.refresh(newton=newton)
    checks += own.checks(after, one.told, evidence.tolerance)
    if newton and isinstance(method, NKFAC):
        averages, solve = own.averages(), evidence.tolerance.solve
        checks += newton_checks(method, averages, before, after, where=one.told, tolerance=solve)
    return checks


def _eager_state_checks(keys: list[str], one: Ran, evidence: Evidence) -> dict[str, list[Check]]:
    """The state against `fold` and `refresh`, called eagerly with the statistics of the batch alone."""
    plan = evidence.ours.plan
    curvature = Curvature(plan.method)
    curvature.load_state_dict(one.saved, [plan])
    outputs = run_program(one.subject, plan, "batch_statistics", curvature)
    with execution():
        curvature.fold(plan, outputs.statistics, outputs.inverse_scale)
        if one.kind == "refresh":
            curvature.refresh(plan.method)
    tolerance = evidence.tolerance.solve if one.kind == "refresh" else evidence.tolerance.product
    return {
        key: [
            compared(f"{name} at {one.told}, eagerly", one.after[key][name], tensor, tolerance=tolerance)
            for name, tensor in curvature.state(key).items()
        ]
        for key in keys
    }


def _direction_checks(held: Mapping[str, Held], one: Ran, evidence: Evidence) -> dict[str, list[Check]]:
    """What the optimizer got, against dense algebra and against the method's own functions."""
    plan, tolerance, method = evidence.ours.plan, evidence.tolerance, evidence.ours.plan.method
    missing = one.plain.gradients.keys() - one.applied.keys()
    matches = plan.matched
    if missing:
        gone = Check(name=f"update at {one.told}", error=math.inf, detail="the optimizer got no gradient")
        return {match.key: [gone] for match in matches}
    gradients = [canonical_gradient(match, one.plain.gradients) for match in matches]
    eager = _eager(plan, gradients, one)
    dense = [held[m.key].direction(g, one.after[m.key]) for m, g in zip(matches, gradients, strict=True)]
    filled = [v if isinstance(d, str) else d for d, v in zip(dense, eager, strict=True)]
    wide = [g.double() for g in gradients]
    scaled = list(filled)
    if isinstance(method, KroneckerFactored):
        scaled = rescaled(method, [v.double() for v in filled], wide, evidence.ours.rate)
    rates = torch.full((len(matches),), evidence.ours.rate, dtype=torch.float64, device=wide[0].device)
    own = method.rescale(eager, gradients, learning_rates=rates.to(gradients[0].dtype))
    found = {}
    for i, match in enumerate(matches):
        applied = canonical_gradient(match, one.applied)
        name = f"update at {one.told}"
        close = tolerance.product * 10
        checks = [compared(f"{name}, eagerly", applied, own[i], tolerance=close)]
        if isinstance(method, KroneckerFactored) and not isinstance(dense[i], str):
            checks.append(compared(name, applied, scaled[i], tolerance=tolerance.solve))
        elif isinstance(dense[i], str) and not held[match.key].reason:
            checks.append(Check(name=name, reason=str(dense[i])))
        found[match.key] = checks
    return found


def _eager(plan: Plan, gradients: list[Tensor], one: Ran) -> list[Tensor]:
    """Directions by the method's own function from the state that is held."""
    pairs = zip(plan.matched, gradients, strict=True)
    return [plan.method.precondition(dict(one.after[match.key]), gradient) for match, gradient in pairs]


def _whole_checks(plan: Plan, one: Ran, tolerance: Tolerance) -> list[Check]:
    """Loss, buffers, and gradients of parameters without a layer."""
    names = {name for match in plan.matched for name in (match.weight, match.bias) if name}
    checks = [compared(f"loss at {one.told}", one.loss, one.plain.loss, tolerance=tolerance.product)]
    for name in one.plain.gradients.keys() - names:
        what = f"gradient of {name} at {one.told}"
        if name not in one.applied:
            checks.append(Check(name=what, error=math.inf, detail="the optimizer got none"))
            continue
        checks.append(_similar(what, one.applied[name], one.plain.gradients[name], one, tolerance))
    checks += [
        _similar(f"{name} at {one.told}", one.buffers[name], wanted, one, tolerance)
        for name, wanted in one.plain.buffers.items()
    ]
    return checks


def _similar(name: str, found: Tensor, expected: Tensor, one: Ran, tolerance: Tolerance) -> Check:
    """Entries that cancel to nothing are measured by the largest gradient of all."""
    largest = max((float(g.abs().max()) for g in one.plain.gradients.values() if g.numel()), default=0.0)
    size = float(expected.abs().max()) if expected.numel() else 0.0
    error = distance(found, expected, size=max(size, 1e-4 * largest))
    return Check(name=name, error=error, tolerance=tolerance.product)
