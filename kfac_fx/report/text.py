"""The one-screen report of a `Plan`, as plain text.

Enters: a plan. Leaves: a string without colour, complete at any width. `kfac_fx.report.table` draws the same
cells in a terminal. Numbers come from `rows`, never from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from kfac_fx.contracts import Plan
from kfac_fx.errors import UnknownNameError, did_you_mean
from kfac_fx.report.rows import LayerRow, Totals, forward_order, layer_labels, layer_rows, skip_rows, totals
from kfac_fx.types import FactorSpec, LayerMatch, Skip

COLUMNS = ("layer", "kind", "x", "uses", "A", "G", "rows", "state", "stats", "invert", "apply", "source")
LEFT_ALIGNED = frozenset({"layer", "kind", "source"})
SOURCE_WIDTH = 48
GAP = "  "
ADVICE_MARK = "->"
SKIPPED_TITLE = "skipped (plain gradient, no preconditioner)"
SHARED_NOTE = "* the same tensor as another layer's input: one A, stored and computed once"


def render(plan: Plan) -> str:
    """The report: header, matched layers with costs, skipped parameters with reasons, cost per step."""
    table = layer_cells(plan, forward_order(plan), collapse=True)
    lines = [*header_lines(plan), "", *aligned(table), *note_lines(table)]
    if plan.skipped:
        lines += ["", SKIPPED_TITLE, *skip_lines(plan.skipped, advice=False)]
    return "\n".join([*lines, "", cost_line(totals(plan))])


def header_lines(plan: Plan) -> list[str]:
    """What was inspected, how much of it is matched, and what is known about the loss."""
    sums = totals(plan)
    settings = f"method {plan.method.name}   sharing {plan.sharing}   fisher {plan.fisher}"
    matched = f"{sums.layers:,} layers, {sums.matched:,} of {sums.trainable:,} parameters"
    share = sums.skipped / sums.trainable if sums.trainable else 0.0
    skipped = f"{_tensors(sums.skipped_tensors)}, {sums.skipped:,} parameters ({share:.1%})"
    frozen = f"     frozen  {_tensors(sums.frozen_tensors)}" if sums.frozen_tensors else ""
    return [
        f"kfac-fx  {plan.capture.model_name}   {settings}   {sums.nodes:,} nodes captured",
        f"loss     {plan.capture.loss_info.note}",
        f"matched  {matched} ({plan.coverage:.1%})     skipped  {skipped}{frozen}",
    ]


def layer_cells(plan: Plan, layers: Sequence[LayerMatch], *, collapse: bool) -> list[list[str]]:
    """Cells of the table, one list per line: column names, these layers, totals."""
    rows = layer_rows(plan, layers, collapse=collapse)
    costs = [row.cost for row in rows for _ in row.members]
    sums = (
        bytes_text(sum(cost.state_bytes for cost in costs)),
        flops_text(sum(cost.statistics for cost in costs)),
        flops_text(sum(cost.inversion for cost in costs)),
        flops_text(sum(cost.apply for cost in costs)),
    )
    footer = ["total", "", str(len(costs)), "", "", "", "", *sums, ""]
    return [list(COLUMNS), *(_cells(row) for row in rows), footer]


def note_lines(cells: Sequence[Sequence[str]]) -> list[str]:
    """The footnote of the table, if a layer in it shares its A."""
    column = COLUMNS.index("A")
    return [SHARED_NOTE] if any(line[column].endswith("*") for line in cells) else []


def natural_widths(cells: Sequence[Sequence[str]]) -> dict[str, int]:
    """Width of each column that cuts nothing."""
    return {name: max(len(line[i]) for line in cells) for i, name in enumerate(COLUMNS)}


def padded(line: Sequence[str], widths: Mapping[str, int]) -> dict[str, str]:
    """The cells of a line that have a width, cut or filled to it."""
    parts = {}
    for name, text in zip(COLUMNS, line, strict=True):
        if name in widths:
            width = widths[name]
            short = text if len(text) <= width else f"{text[: width - 2]}.."
            parts[name] = short.ljust(width) if name in LEFT_ALIGNED else short.rjust(width)
    return parts


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """The table as lines of text."""
    widths = natural_widths(cells)
    return [GAP.join(padded(line, widths).values()).rstrip() for line in cells]


def skip_lines(skips: Sequence[Skip], *, advice: bool) -> list[str]:
    """Skipped parameters by reason. advice: add what to do about each reason."""
    cells, advice_after = [], {}
    for reason, rows in skip_rows(skips).items():
        for row in rows:
            count = f"x{len(row.members)}" if len(row.members) > 1 else ""
            cells.append([row.label, count, reason.value, row.detail, row.sources])
        advice_after[len(cells) - 1] = reason.advice
    widths = [max(len(line[column]) for line in cells) for column in range(4)] if cells else []
    lines = []
    for index, (*fields, source) in enumerate(cells):
        padded = "  ".join(field.ljust(width) for field, width in zip(fields, widths, strict=True))
        lines.append(f"  {padded}  {source}".rstrip())
        if advice and index in advice_after:
            lines.append(f"      {ADVICE_MARK} {advice_after[index]}")
    return lines


def cost_line(sums: Totals) -> str:
    """What one training step costs beyond the model's own work, averaged over the schedule."""
    model = f"model {flops_text(sums.model_flops)}"
    apply = f"apply {flops_text(sums.cost.apply)}{_extra(sums, 'apply')}"
    statistics = f"statistics {flops_text(sums.cost.statistics)} every {sums.statistics_every}"
    refreshes = f"{flops_text(sums.cost.inversion)} every {sums.inverse_every}"
    inversion = f"inversion {refreshes}" if sums.inverse_every else "inversion never"
    return "   ".join(
        [
            f"per step  {model}",
            apply,
            statistics + _extra(sums, "statistics"),
            inversion + (_extra(sums, "inversion") if sums.inverse_every else ""),
            f"total{_extra(sums, 'total', parentheses=False)}",
        ]
    )


def select(plan: Plan, pattern: str) -> tuple[list[LayerMatch], list[Skip]]:
    """Layers (by path, weight or key) and skipped parameters that fit an fnmatch pattern, at least one."""
    labels = layer_labels(plan)
    layers = []
    for match in forward_order(plan):
        if any(fnmatchcase(n, pattern) for n in (labels[match.key], match.name, match.weight, match.key)):
            layers.append(match)
    skips = [skip for skip in plan.skipped if fnmatchcase(skip.parameter, pattern)]
    if not layers and not skips:
        known = [*labels.values(), *(skip.parameter for skip in plan.skipped)]
        raise UnknownNameError(f"no layer or parameter fits {pattern!r}.{did_you_mean(pattern, known)}")
    return layers, skips


def bytes_text(number: int) -> str:
    """Bytes in powers of 1024: `160.5K`."""
    return _scaled(number, base=1024)


def flops_text(number: int) -> str:
    """Operations in powers of 1000: `21.0M`."""
    return _scaled(number, base=1000)


def _tensors(number: int) -> str:
    return f"{number:,} tensor" + ("" if number == 1 else "s")


def _scaled(number: int, *, base: int) -> str:
    value = float(number)
    for suffix in ("", "K", "M", "G", "T", "P"):
        text = f"{value:.1f}{suffix}" if suffix else str(number)
        if suffix == "P" or round(value, 1 if suffix else 0) < base:
            return text
        value /= base
    raise AssertionError("unreachable: the largest suffix takes every number")


def _extra(sums: Totals, phase: str, *, parentheses: bool = True) -> str:
    share = sums.overhead(phase)
    if share is None:
        return ""
    text = f"+{share:.1%}" if share < 0.1 else f"+{share:.0%}"
    return f" ({text})" if parentheses else f" {text}"


def _cells(row: LayerRow) -> list[str]:
    match, cost = row.first, row.cost
    source = f"{match.source}  {match.source.code.strip()}" if match.source else ""
    if len(source) > SOURCE_WIDTH:
        source = source[: SOURCE_WIDTH - 2] + ".."
    sizes = {factor.side: _size(factor) for factor in row.factors}
    output = f"F {sizes['F']}" if "F" in sizes else sizes.get("G", "-")
    return [
        row.label,
        match.kind,
        str(row.count),
        str(len(match.uses)),
        sizes.get("A", "-"),
        output,
        f"{match.rows:,}",
        bytes_text(cost.state_bytes),
        flops_text(cost.statistics),
        flops_text(cost.inversion),
        flops_text(cost.apply),
        source,
    ]


def _size(factor: FactorSpec) -> str:
    """`65^2`: a square factor; `8x9^2`: eight of them; `1000`: a vector; `65/32`: 32 columns of length 65.

    A star marks a shared one.
    """
    side = str(factor.dim) if factor.diagonal else f"{factor.dim}^2"
    if factor.columns is not None:
        side = f"{factor.dim}/{factor.columns}"
    return (f"{factor.count}x" if factor.count > 1 else "") + side + ("*" if factor.shared_with else "")
