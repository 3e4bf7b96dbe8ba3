"""`verify`: this library's results on the user's model and batch against independent ones."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kfac_fx import guards
from kfac_fx.contracts import Method, rounds_rows
from kfac_fx.errors import CaptureError, check_choice
from kfac_fx.methods import resolve
from kfac_fx.report.rows import forward_order
from kfac_fx.types import Fisher, LossFn, Sharing
from kfac_fx.verification.eager import Observed, add_pass, observed_step, plain_step
from kfac_fx.verification.graph_rows import Values, node_values
from kfac_fx.verification.later import later_checks
from kfac_fx.verification.layers import Evidence, verdict
from kfac_fx.verification.ours import Ours, arguments, our_results
from kfac_fx.verification.records import Check, Verification
from kfac_fx.verification.schedule import refusal
from kfac_fx.verification.text import render
from kfac_fx.verification.tolerance import Tolerance, tolerance_of
from kfac_fx.verification.training import later_steps
from kfac_fx.verification.twin import Subject, seeded, subject_of
from kfac_fx.verification.update import update_checks
from kfac_fx.verification.whole import cotangent_check, scale_check, step_checks


def verify(
    model: nn.Module,
    loss_fn: LossFn | None = None,
    inputs: Any = None,
    targets: Any = None,
    *,
    method: str | Method = "kfac",
    fisher: Fisher = "empirical",
    sharing: Sharing = "expand",
    exclude: Sequence[str] = (),
    float64: bool = True,
) -> Verification:
    """Check what `compile` does with this model and batch against plain PyTorch and explicit formulas.

    Everything runs on copies: model, batch and random generators stay as they are. `print` shows a verdict
    per layer; `.ok` is False if anything is violated.

    Args:
        model: as in `compile`.
        loss_fn: as in `compile`.
        inputs: of the batch that is verified.
        targets: of the same batch.
        method: a name of `methods()`, or an instance.
        fisher: as in `compile`.
        sharing: as in `compile`.
        exclude: as in `compile`.
        float64: run in float64, where rounding hides nothing, if the model does; else in its own dtype with
            tolerances of that dtype, as with `statistics_precision="bfloat16"`.

    Raises:
        KfacFxError: as `compile` and its first step do, or if the model cannot be copied.
    """
    begun = time.perf_counter()
    check_choice("fisher", fisher, ("empirical", "mc", "type2"))
    check_choice("sharing", sharing, ("expand", "reduce"))
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    guards.check_exclude(patterns, model)
    guards.check_sized(model)
    guards.check_trainable(model)
    method = resolve(method)
    wide = float64 and not rounds_rows(method)  # rows of float64 round to others
    subject = subject_of(model, loss_fn, inputs, targets, float64=wide)
    if float64 and not wide:
        subject = replace(subject, note="the model's own, since statistics are of rows rounded to bfloat16")
    options = {"fisher": fisher, "sharing": sharing, "exclude": patterns}
    try:
        ours = our_results(subject, method=method, options=options)
    except CaptureError as error:
        if subject.dtype != torch.float64:
            raise
        subject = subject_of(model, loss_fn, inputs, targets, float64=False)
        subject = replace(subject, note=f"the model's own; in float64 {error}")
        ours = our_results(subject, method=method, options=options)
    found = _verified(subject, ours)
    return replace(found, seconds=time.perf_counter() - begun)


def _verified(subject: Subject, ours: Ours) -> Verification:
    tolerance, plain, observed = tolerance_of(subject.dtype), plain_step(subject), observed_step(subject)
    with seeded(subject.model):
        values = node_values(ours.plan, arguments(subject))
    whole = _whole_checks(
        ours,
        observed,
        values,
        step_checks(plain, ours.gradients, ours.plan, tolerance=tolerance.product),
        tolerance,
    )
    shown = _with_passes(ours, observed, values)
    evidence = Evidence(plain=plain, observed=shown, ours=ours, values=values, tolerance=tolerance)
    with torch.no_grad():
        updates, others = update_checks(subject, plain, ours, tolerance=tolerance)
        layers = [verdict(match, evidence) for match in forward_order(ours.plan)]
    ran, stopped = ([], None) if refusal(ours.plan.method) else later_steps(subject, ours.training)
    with torch.no_grad():
        later, later_whole = later_checks(evidence, ran, stopped)
    layers = [
        replace(one, checks=(*one.checks, updates[one.layer.key], later[one.layer.key])) for one in layers
    ]
    return Verification(
        plan=ours.plan,
        whole=(*whole, others, later_whole),
        layers=tuple(layers),
        precision=str(subject.dtype).removeprefix("torch."),
        note=subject.note,
        seconds=0.0,
        render=render,
    )


def _whole_checks(
    ours: Ours, observed: Observed, values: Values, checks: tuple[Check, ...], tolerance: Tolerance
) -> list[Check]:
    inverse = ours.gradients.inverse_scale
    found = [*checks, scale_check(ours.plan, observed, inverse, tolerance=tolerance.product)]
    if ours.plan.fisher != "empirical":
        seeds = [values[passed.seed] for passed in ours.plan.capture.passes[1:]]
        found.append(cotangent_check(ours.plan, observed, seeds, inverse, tolerance=tolerance.product))
    return found


def _with_passes(ours: Ours, observed: Observed, values: Values) -> Observed | None:
    """The observed run with the backward passes of the Fisher; None where their seeds are not all known."""
    passes = ours.plan.capture.passes[1:]
    if not passes:
        return observed
    if len(observed.losses) != 1:
        return None
    for passed in passes:
        add_pass(observed, observed.losses[0].prediction, values[passed.seed])
    return observed
