"""The one-screen report of a `Plan`: header, layers, what is skipped, what a step costs.

Enters: a plan. Leaves: lines of coloured pieces, or one string without colour, complete at any width.
`kfac_fx.report.table` prints the same lines in a terminal. Numbers come from `rows`, never from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from kfac_fx.errors import UnknownNameError, did_you_mean
from kfac_fx.planned import Plan
from kfac_fx.report.cells import COLUMNS, hidden_columns, layer_cells, table_lines
from kfac_fx.report.comments import in_comment
from kfac_fx.report.lines import GAP, Line, broken, line, plain_text, wrapped
from kfac_fx.report.numbers import bytes_text, flops_text, part_text, share_text, tensors_text
from kfac_fx.report.rows import (
    Totals,
    estimated_ns,
    factors_by_layer,
    fits,
    forward_order,
    layer_labels,
    settings,
    totals,
)
from kfac_fx.report.skips import SkipRow, skip_rows
from kfac_fx.types import LayerMatch, Skip
from kfac_fx.wording import counted

ADVICE_MARK = "->"
SKIPPED_TITLE = "skipped (plain gradient, no preconditioner)"
SIZES_NOTE = "A, G of each layer: n^2 matrix, n diagonal, k x n^2 per group or channel"
THIN_NOTE = ", n/m thin with m columns"
HIDDEN_REMEDY = "widen the terminal, or --json"
COSTS_NOTE = "of all x layers: state in bytes; stats, refresh, apply in FLOPs each time"
SHARED_NOTE = "* the same tensor as another layer's input: one A, stored and computed once"
FORM_NOTE = "form: how A of a convolution is computed, by estimated time"

_INDENT = 9


def render(plan: Plan) -> str:
    """The report: header, matched layers with costs, skipped parameters with reasons, cost per step."""
    return plain_text(report_lines(plan))


def report_lines(
    plan: Plan, *, width: int | None = None, advice: bool = False, layer: str | None = None
) -> list[Line]:
    """The report as lines of (text, role).

    width: characters per line, None for as many as it takes. advice: what to do about each reason. layer:
    only what fits this pattern, not collapsed, with more about each factor, and no cost per step.
    """
    layers, skips = (forward_order(plan), plan.skipped) if layer is None else select(plan, layer)
    lines = header_lines(plan, width=width)
    if layers:
        cells = layer_cells(plan, layers, collapse=layer is None)
        lines += [line(""), *table_lines(cells, width=width), *note_lines(cells, width=width)]
        if layer is not None:
            lines += [line(""), *factor_lines(plan, layers, width=width)]
    if skips:
        lines += [line(""), *wrapped(SKIPPED_TITLE, width=width, indent=2, role="skipped")]
        lines += skip_lines(skips, advice=advice, width=width)
    return lines if layer is not None else [*lines, line(""), *cost_lines(totals(plan), width=width)]


def header_lines(plan: Plan, *, width: int | None = None) -> list[Line]:
    """What was inspected, how much of it is matched, and what is known about the loss."""
    sums = totals(plan)
    title = [
        f"kfac-fx  {plan.capture.model_name}",
        *(f"{name} {value}" for name, value in settings(plan)),
        f"{counted(sums.nodes, 'node')} captured",
    ]
    share = sums.skipped / sums.trainable if sums.trainable else 0.0
    skipped = (
        f"{tensors_text(sums.skipped_tensors)}, {counted(sums.skipped, 'parameter')} ({part_text(share)})"
    )
    matched = f"{counted(sums.layers, 'layer')}, {sums.matched:,} of {counted(sums.trainable, 'parameter')}"
    account = [
        f"matched  {matched} ({part_text(plan.coverage)})",
        f"  skipped  {skipped if sums.skipped_tensors else 'nothing'}",
    ]
    if sums.frozen_tensors:
        account.append(f"  frozen  {tensors_text(sums.frozen_tensors)}")
    return [
        *broken(title, width=width, indent=_INDENT, role="title"),
        *wrapped(f"loss     {plan.capture.loss_info.note}", width=width, indent=_INDENT),
        *broken(account, width=width, indent=_INDENT - 2),
    ]


def note_lines(cells: Sequence[Sequence[str]], *, width: int | None = None) -> list[Line]:
    """Which columns do not fit, and what they mean; of form and shared A only if a layer has them."""
    hidden = hidden_columns(cells, width=width)
    shared = any(texts[COLUMNS.index("A")].endswith("*") for texts in cells)
    forms = bool(cells[0][COLUMNS.index("form")])
    thin = any("/" in texts[COLUMNS.index(side)] for texts in cells for side in "AG")
    sizes = SIZES_NOTE + (THIN_NOTE if thin else "")
    missing = f"hidden: {', '.join(hidden)} ({HIDDEN_REMEDY})"
    notes = [
        *([missing] if hidden else []),
        sizes,
        COSTS_NOTE,
        *([FORM_NOTE] if forms else []),
        *([SHARED_NOTE] if shared else []),
    ]
    return [piece for note in notes for piece in wrapped(note, width=width, indent=2, role="note")]


def factor_lines(plan: Plan, layers: Sequence[LayerMatch], *, width: int | None = None) -> list[Line]:
    """How each factor of these layers is computed, and whose it is when it is shared."""
    labels, owned = (
        {key: in_comment(label) for key, label in layer_labels(plan).items()},
        factors_by_layer(plan),
    )
    lines = []
    longest = max(len(labels[match.key]) for match in layers)
    for match in layers:
        for factor in owned[match.key]:
            facts = [
                f"  {labels[match.key]:<{longest}}",
                factor.side,
                str(factor.dtype).removeprefix("torch."),
                factor.form,
            ]
            nanoseconds = estimated_ns(match, factor)
            if nanoseconds is not None:
                facts.append(f"estimated {nanoseconds / 1e6:.3g} ms")
            if factor.shared_with:
                facts.append(f"that of {labels.get(factor.shared_with, factor.shared_with)}")
            lines += broken(facts, width=width, indent=4)
    return lines


def skip_lines(skips: Sequence[Skip], *, advice: bool, width: int | None = None) -> list[Line]:
    """Skipped parameters by reason, one row each, or below their reason where that is too narrow."""
    by_reason = skip_rows(skips)
    cells = [_skip_cells(row) for rows in by_reason.values() for row in rows]
    widths = [max(len(texts[column]) for texts in cells) for column in range(5)] if cells else []
    narrow = width is not None and sum(widths[:4]) + len(GAP) * 4 > width
    lines = []
    for reason, rows in by_reason.items():
        for detail in dict.fromkeys(row.detail for row in rows) if narrow else []:
            lines += wrapped(f"{GAP}{reason.value}: {detail}", width=width, indent=4)
            for label, count, *_, source in map(_skip_cells, (r for r in rows if r.detail == detail)):
                lines += broken([f"    {label}", *filter(None, (count, source))], width=width, indent=6)
        for row in [] if narrow else rows:
            *texts, source = _skip_cells(row)
            padded = GAP.join(t.ljust(w) for t, w in zip(texts, widths, strict=False))
            has_room = width is None or len(GAP + padded + GAP + source) <= width
            lines.append(line((GAP + padded + (GAP + source if has_room else "")).rstrip()))
        if advice:
            lines += wrapped(f"      {ADVICE_MARK} {reason.advice}", width=width, indent=9, role="advice")
    return lines


def cost_lines(sums: Totals, *, width: int | None = None) -> list[Line]:
    """What a training step costs beyond the model's own work, averaged over the schedule, and the memory."""
    phases = {
        "apply": f"apply {flops_text(sums.cost.apply)}",
        "statistics": f"statistics {_statistics(sums)} {_every(sums.statistics_every)}",
        "inversion": f"refresh {flops_text(sums.cost.inversion)} {_every(sums.inverse_every)}"
        if sums.inverse_every
        else "refresh never",
    }
    phases |= {
        phase: f"{'refresh' if phase == 'inversion' else phase} off" for phase in phases if phase in sums.off
    }
    shares = {phase: sums.overhead(phase) for phase in (*phases, "total")}
    parts = [f"per step  model {flops_text(sums.model_flops)}"]
    for phase, text in phases.items():
        never = phase in sums.off or (phase == "inversion" and not sums.inverse_every)
        share = None if never else shares[phase]
        parts.append(text if share is None else f"{text} ({share_text(share)})")
    if shares["total"] is not None:
        parts.append(f"total {share_text(shares['total'])} FLOPs")
    memory = (
        f"memory    parameters {bytes_text(sums.parameter_bytes)}   state {bytes_text(sums.cost.state_bytes)}"
    )
    if sums.parameter_bytes:
        memory += f" ({sums.cost.state_bytes / sums.parameter_bytes:,.1f} times the parameters)"
    return [
        *broken(parts, width=width, indent=_INDENT + 1, role="cost"),
        *wrapped(memory, width=width, indent=_INDENT + 1, role="cost"),
    ]


def _statistics(sums: Totals) -> str:
    """FLOPs of statistics, and how many of them are in backward passes of their own."""
    passes = f" ({flops_text(sums.fisher_flops)} in backward passes)" if sums.fisher_flops else ""
    return flops_text(sums.cost.statistics) + passes


def select(plan: Plan, pattern: str) -> tuple[list[LayerMatch], list[Skip]]:
    """Layers (by path, weight or key) and skipped parameters that fit an fnmatch pattern, at least one."""
    labels = layer_labels(plan)
    layers = [match for match in forward_order(plan) if fits(match, labels, pattern)]
    skips = [skip for skip in plan.skipped if fnmatchcase(skip.parameter, pattern)]
    if not layers and not skips:
        known = [*labels.values(), *(skip.parameter for skip in plan.skipped)]
        raise UnknownNameError(f"no layer or parameter fits {pattern!r}.{did_you_mean(pattern, known)}")
    return layers, skips


def _every(steps: int) -> str:
    return {0: "never", 1: "every step"}.get(steps, f"every {steps}")


def _skip_cells(row: SkipRow) -> list[str]:
    count = f"x{len(row.members)}" if len(row.members) > 1 else ""
    return [in_comment(text) for text in (row.label, count, row.reason.value, row.detail, row.sources)]
