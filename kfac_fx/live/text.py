"""A `StepReport` as one screen of text: layers in the order of the forward, those alike in one line.

Of more than fit, the worst-conditioned ones.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from kfac_fx.live.health import FactorHealth, LayerHealth
from kfac_fx.live.records import StepReport
from kfac_fx.report.comments import in_comment
from kfac_fx.report.numbers import bytes_text
from kfac_fx.wording import counted

LINES = 20
GAP = "  "
LEFT = ("layer", "factor")
FIGURES = ("largest", "damping", "condition", "damped", "eff. rank", "residual")
COLUMNS = ("layer", "x", "factor", *FIGURES, "stats", "inv", "age")
NOTES = (
    "Of alike layers and groups the worst. largest: eigenvalue; damping: added to each eigenvalue.",
    "condition: largest over smallest eigenvalue; damped: the same with damping.",
    "eff. rank: exp of the eigenvalues' entropy. residual: |inverse (factor + damping) - I| / sqrt(d) of the",
    "last inverse with the present factor. stats, inv: updates, refreshes; age: steps since the last.",
)


def render(report: StepReport) -> str:
    """Losses, damping, length, counts, times; then the table of factors."""
    head = f"{report.method}  {counted(report.steps, 'step')}   state {bytes_text(report.state_bytes)}"
    if not report.losses and not report.steps:
        return f"{report.method}  no step has run yet: call step(inputs, targets)"
    lines = [head, *_loss_lines(report), _damping_line(report), _kl_line(report)]
    lines.append(f"refresh  retried {report.retried:,}   kept last {report.kept_last:,}")
    lines += _time_lines(report)
    return "\n".join([*lines, *_table_lines(report)])


def _loss_lines(report: StepReport) -> list[str]:
    losses = report.losses
    if not losses:
        return ["loss     none since the state was loaded"]
    spread = f"mean {_number(statistics.fmean(losses))}, {_number(min(losses))} to {_number(max(losses))}"
    return [f"loss     {_number(losses[-1])}   last {len(losses):,}: {spread}"]


def _damping_line(report: StepReport) -> str:
    gamma = "" if report.gamma is None else f"   gamma {_number(report.gamma)}"
    ratio = "" if report.reduction_ratio is None else f"   reduction ratio {_number(report.reduction_ratio)}"
    return f"damping  {_number(report.damping)}{gamma}{ratio}"


def _kl_line(report: StepReport) -> str:
    if report.kl is None:
        return f"kl       not known: {report.kl_note}"
    clip = "" if report.kl.clip is None else f"   clip {_number(report.kl.clip)}"
    at = "" if report.kl.step == report.steps else f"   at step {report.kl.step:,}, the last that has one"
    return f"kl       {_number(report.kl.value)}{clip}{at}"


def _time_lines(report: StepReport) -> list[str]:
    if not report.kinds:
        return []
    parts = [f"{kind.name} {1e3 * kind.median:,.1f} ms (x{kind.count:,})" for kind in report.kinds]
    lines = [f"time     {'   '.join(parts)}   (medians)"]
    for number, phase in enumerate(report.phases):
        lines.append(f"{'' if number else 'phases':<9}{1e3 * phase.median:,.1f} ms  {phase.name}")
    return lines


def _table_lines(report: StepReport) -> list[str]:
    groups: dict[str, list[LayerHealth]] = {}
    for layer in report.layers:
        groups.setdefault(layer.group, []).append(layer)
    if not groups:
        waiting = report.state_bytes > 0  # loaded: which layer a state belongs to, the capture knows
        return ["factors  of the loaded state are known from the next step"] if waiting else []
    shown = _fitting(groups)
    header: list[str] = list(COLUMNS)
    lines = [header, *(cells for name in groups if name in shown for cells in shown[name])]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    table = ["", *(_aligned(line, widths) for line in lines)]
    if len(shown) < len(groups):
        more = len(groups) - len(shown)
        table.append(f"and {counted(more, 'more line')} of layers, better conditioned: report.layers")
    if report.left_out:
        left = counted(len(report.left_out), "layer")
        table.append(f"no eigenvalues of {left} with factors beyond max_dim={report.max_dim}")
    return [*table, *NOTES]


def _fitting(groups: Mapping[str, list[LayerHealth]]) -> dict[str, list[list[str]]]:
    """Cells of the groups that fit a screen by their names: the worst-conditioned, at least one."""
    found: dict[str, list[list[str]]] = {}
    room = LINES
    for name in sorted(groups, key=lambda name: -max(layer.severity for layer in groups[name])):
        cells = _cells(groups[name])
        if found and len(cells) > room:
            break
        found[name], room = cells, room - len(cells)
    return found


def _cells(group: list[LayerHealth]) -> list[list[str]]:
    """A line per factor."""
    lines = []
    ages = [layer.since_refresh for layer in group if layer.since_refresh is not None]
    counts = [
        str(min(layer.statistics for layer in group)),
        str(min(layer.refreshes for layer in group)),
        str(max(ages)) if len(ages) == len(group) else "-",
    ]
    for index, (first, *_) in enumerate(zip(*(layer.factors for layer in group), strict=True)):
        factors = [layer.factors[index] for layer in group]
        worst = max(factors, key=lambda factor: factor.severity)
        name = (
            [in_comment(group[0].group), f"x{len(group)}" if len(group) > 1 else ""]
            if index == 0
            else ["", ""]
        )
        lines.append(
            [*name, _size(first), *_figures(worst, factors), *(counts if index == 0 else ["", "", ""])]
        )
    return lines


def _figures(worst: FactorHealth, factors: list[FactorHealth]) -> list[str]:
    rank = "-" if worst.effective_rank is None else f"{worst.effective_rank:.1f}"
    residuals = [factor.residual for factor in factors if factor.residual is not None]
    return [
        _number(worst.largest),
        _number(worst.damping),
        _number(worst.condition),
        _number(worst.damped_condition),
        rank,
        _number(max(residuals) if residuals else None),
    ]


def _size(factor: FactorHealth) -> str:
    return f"{factor.side} {f'{factor.count}x' if factor.count > 1 else ''}{factor.dim}"


def _aligned(line: list[str], widths: list[int]) -> str:
    cells = [
        text.ljust(width) if name in LEFT else text.rjust(width)
        for name, text, width in zip(COLUMNS, line, widths, strict=True)
    ]
    return GAP.join(cells).rstrip()


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if math.isinf(value):
        return "singular" if value > 0 else "-inf"
    return f"{value:.3g}"
