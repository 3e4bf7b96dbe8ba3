"""model + loss + batch -> `Plan`: capture, match and plan in one call, for `inspect` and for `TrainStep`."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from torch import nn

from kfac_fx import forms, stages
from kfac_fx.batch import Batch
from kfac_fx.capture import capture
from kfac_fx.contracts import Method
from kfac_fx.errors import CaptureError
from kfac_fx.match import match
from kfac_fx.plan import check_strict, make_plan
from kfac_fx.planned import Plan
from kfac_fx.report import render
from kfac_fx.traced import Capture
from kfac_fx.types import Fisher, LossFn, Matches, Sharing
from kfac_fx.wording import counted


def trace(
    model: nn.Module,
    loss_fn: LossFn | None,
    batch: Batch,
    *,
    method: Method,
    fisher: Fisher,
    sharing: Sharing,
    exclude: tuple[str, ...],
    strict: bool,
    rows: Mapping[str, tuple[int, int]] | None = None,
    without: frozenset[str] = frozenset(),
) -> Plan:
    """The plan for batches of these shapes.

    rows: (rows, examples) of the batch that laid out the state of a layer, by key, where there is one.
    without: passes that are switched off. With `strict`, raises `UnsupportedModelError` if anything is
    skipped.
    """
    captured = _capture(model, loss_fn, batch, fisher)

    def excluded(name: str) -> bool:
        parameter = captured.parameter(name)
        return any(fnmatch.fnmatch(n, p) for p in exclude for n in (name, *parameter.aliases))

    try:
        matches = _match(captured, excluded, without)
        with stages.running("plan", captured.graph.graph.nodes) as running:
            plan = make_plan(
                captured,
                matches,
                method,
                fisher=fisher,
                sharing=sharing,
                render=render,
                rows=rows or {},
                without=without,
            )
            running.did = (
                f"{counted(len(plan.matched), 'layer')} by {method.name}, {_state_size(plan)} of state"
            )
    except CaptureError as error:
        raise CaptureError(f"{captured.model_name} cannot be captured as one graph: {error}") from error
    if strict:
        check_strict(plan)
    return plan


def _capture(model: nn.Module, loss_fn: LossFn | None, batch: Batch, fisher: Fisher) -> Capture:
    with stages.running("capture") as running:
        captured = capture(model, loss_fn, batch, fisher=fisher)
        running.nodes = captured.graph.graph.nodes
        backwards = f"{len(captured.passes)} backward passes" if len(captured.passes) > 1 else "backward"
        running.did = f"forward, loss and {backwards} of {captured.model_name}, fisher {fisher}"
    return captured


def _match(captured: Capture, excluded: Callable[[str], bool], without: frozenset[str]) -> Matches:
    with stages.running("match", captured.graph.graph.nodes) as running, ExitStack() as stack:
        if not stages.runs("forms", without):
            stack.enter_context(forms.patches_only())
        matches = match(captured, exclude=excluded)
        layers, skipped = counted(len(matches.matched), "layer"), counted(len(matches.skipped), "parameter")
        running.did = f"{layers} matched, {skipped} skipped"
    return matches


def _state_size(plan: Plan) -> str:
    size = sum(factor.bytes for factor in plan.factors)
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
