"""model + loss + batch -> `Plan`: capture, match and plan in one call, for `inspect` and for `TrainStep`."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

from torch import nn

from kfac_fx.batch import Batch
from kfac_fx.capture import capture
from kfac_fx.contracts import Method, Plan
from kfac_fx.errors import CaptureError
from kfac_fx.match import match
from kfac_fx.plan import check_strict, make_plan
from kfac_fx.report import render
from kfac_fx.types import Fisher, LossFn, Sharing


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
) -> Plan:
    """The plan for batches of these shapes.

    rows: (rows, examples) of the batch that laid out the state of a layer, by key, where there is one. With
    `strict`, raises `UnsupportedModelError` if anything is skipped.
    """
    captured = capture(model, loss_fn, batch, fisher=fisher)

    def excluded(name: str) -> bool:
        parameter = captured.parameter(name)
        return any(fnmatch.fnmatch(n, p) for p in exclude for n in (name, *parameter.aliases))

    try:
        matches = match(captured, exclude=excluded)
        plan = make_plan(
            captured, matches, method, fisher=fisher, sharing=sharing, render=render, rows=rows or {}
        )
    except CaptureError as error:
        raise CaptureError(f"{captured.model_name} cannot be captured as one graph: {error}") from error
    if strict:
        check_strict(plan)
    return plan
