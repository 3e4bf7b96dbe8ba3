"""The report of a `Verification`, as lines of text.

Enters: a verification. Leaves: lines with the style of each in a terminal. Layers that are alike and have one
verdict share a line; its error is the largest of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from kfac_fx.report.rows import LayerRow, layer_labels, layer_rows
from kfac_fx.types import LayerMatch
from kfac_fx.verification.records import Check, LayerVerdict, Verification
from kfac_fx.wording import counted

CHECKED = ("gradient", "statistics", "direction", "update", "later steps")
COLUMNS = ("layer", "kind", "x", "seen at", *CHECKED, "source")
STYLES = {"ok": "green", "violated": "bold red", "not checked": "yellow"}
_GAP = "  "


@final
@dataclass(frozen=True, kw_only=True)
class VerdictRow:
    """Layers that are alike and have the same verdict; checks: the worst of each kind."""

    row: LayerRow
    verdicts: tuple[LayerVerdict, ...]
    checks: tuple[Check, ...]


def verdict_rows(verification: Verification) -> list[VerdictRow]:
    """Rows in forward order."""
    by_key = {verdict.layer.key: verdict for verdict in verification.layers}
    groups: dict[object, list[LayerMatch]] = {}
    for verdict in verification.layers:
        alike = (verdict.rows, tuple((check.status, check.reason) for check in verdict.checks))
        groups.setdefault(alike, []).append(verdict.layer)
    rows = []
    for layers in groups.values():
        for row in layer_rows(verification.plan, layers, collapse=True):
            verdicts = tuple(by_key[member.key] for member in row.members)
            kinds = zip(*(verdict.checks for verdict in verdicts), strict=True)
            worst = tuple(max(checks, key=lambda check: check.error or 0.0) for checks in kinds)
            rows.append(VerdictRow(row=row, verdicts=verdicts, checks=worst))
    order = {verdict.layer.key: place for place, verdict in enumerate(verification.layers)}
    return sorted(rows, key=lambda row: order[row.row.first.key])


def render(verification: Verification) -> str:
    """All lines."""
    return "\n".join(line for line, _ in styled_lines(verification))


def styled_lines(verification: Verification) -> list[tuple[str, str]]:
    """(line, style) of the report: header, whole model, layers, what is violated, what is not checked."""
    plan = verification.plan
    settings = f"method {plan.method.name}   sharing {plan.sharing}   fisher {plan.fisher}"
    title = f"kfac-fx verify  {plan.capture.model_name}   {settings}"
    precision = f"in {verification.precision} ({verification.note}), {verification.seconds:.1f} s"
    lines = [(title, "bold"), (precision, ""), ("", ""), *_whole_lines(verification), ("", "")]
    rows = verdict_rows(verification)
    table = _aligned([list(COLUMNS), *(_cells(row) for row in rows)])
    lines.append((table[0], "bold"))
    styles = [STYLES[_worst(row)] if _worst(row) != "ok" else "" for row in rows]
    lines += list(zip(table[1:], styles, strict=True))
    lines += _details(verification, rows)
    good = verification.ok
    return [*lines, ("", ""), (total_line(verification), "bold green" if good else "bold red")]


def total_line(verification: Verification) -> str:
    """One sentence: how many layers have which verdict, and the rest."""
    found = [verdict.status for verdict in verification.layers]
    whole = [check.status for check in verification.whole]
    parts = [f"{found.count('ok')} of {counted(len(found), 'layer')} ok"]
    if "violated" in found:
        parts.append(f"{found.count('violated')} VIOLATED")
    if "not checked" in found:
        parts.append(f"{found.count('not checked')} not checked in every part")
    parts.append(f"whole model {'VIOLATED' if 'violated' in whole else 'ok'}")
    skipped = len(verification.plan.skipped)
    parts.append(f"{counted(skipped, 'parameter tensor')} without a layer")
    return "verified: " + ", ".join(parts)


def _worst(row: VerdictRow) -> str:
    return row.verdicts[0].status


def _whole_lines(verification: Verification) -> list[tuple[str, str]]:
    cells = [[check.name, cell(check), check.reason or check.detail] for check in verification.whole]
    styles = [STYLES[check.status] if check.status != "ok" else "" for check in verification.whole]
    return list(zip(_aligned(cells), styles, strict=True))


def cell(check: Check) -> str:
    """`ok 2e-16`, `VIOLATED 0.3`, `not checked` or `none`."""
    if check.error is None:
        return "not checked"
    if check.nothing:
        return "none"
    return f"{'ok' if check.status == 'ok' else 'VIOLATED'} {check.error:.0e}"


def _cells(row: VerdictRow) -> list[str]:
    match = row.row.first
    source = f"{match.source}  {match.source.code.strip()}" if match.source else ""
    short = source if len(source) <= 48 else f"{source[:46]}.."
    rows = row.verdicts[0].rows
    return [row.row.label, match.kind, str(row.row.count), rows, *map(cell, row.checks), short]


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [_GAP.join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]


def _details(verification: Verification, rows: Sequence[VerdictRow]) -> list[tuple[str, str]]:
    """Each violation with its layer and line; each reason for not checking with its layers."""
    labels = layer_labels(verification.plan)
    lines: list[tuple[str, str]] = []
    for verdict in verification.layers:
        for check in verdict.checks:
            if check.status == "violated":
                lines.append((_violation(check, labels[verdict.layer.key], verdict.layer), "red"))
    if lines:
        lines = [("", ""), *lines]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for check in row.checks:
            if check.error is None:
                reasons.setdefault(f"{check.name}: {check.reason}", []).append(row.row.label)
    if reasons:
        lines.append(("", ""))
        lines += [
            (f"not checked  {reason}  ({', '.join(names)})", "yellow") for reason, names in reasons.items()
        ]
    return lines


def _violation(check: Check, label: str, layer: LayerMatch) -> str:
    where = f"  {layer.source}: {layer.source.code.strip()}" if layer.source else ""
    what = f"{check.name} ({check.detail})" if check.detail else check.name
    return f"VIOLATED  {label}  {what}: error {check.error:.1e}, tolerance {check.tolerance:.0e}{where}"
