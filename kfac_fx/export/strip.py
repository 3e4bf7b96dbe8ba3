"""The strip: layers in order, their factors drawn to scale, as an SVG of its own.

Enters: a plan. Leaves: text, made of strings alone. The drawing reads well in light and dark, and says its
scale. Each layer is a link to its place in `index.html`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from urllib.parse import quote

from kfac_fx.export.strip_parts import PROPORTIONAL, Frame, bar, cut, escaped, rect, text_at
from kfac_fx.planned import Plan
from kfac_fx.report.numbers import bytes_text, flops_text
from kfac_fx.report.rows import Cost, LayerRow, Totals, forward_order, layer_rows, totals
from kfac_fx.report.skips import SkipRow, skip_rows
from kfac_fx.types import FactorSpec
from kfac_fx.wording import counted

WIDTH = 1330
LEAST_WIDTH = 1016
_SIDE = 38.0
_ROW = 21
_TOP = 84
_LABEL, _A, _G, _SIZES, _STATE, _WORK, _SOURCE = 12, 322, 374, 412, 616, 744, 878
_NUMBER = 112
_GAP = 24
_SCALE = "The area of a square is proportional to d. Memory grows with d^2, the cost of a refresh with d^3."
_STYLE = """
.strip{--ink:#1c2430;--dim:#5b6675;--rule:#e3e7ec;--A:#0d7d78;--G:#b7791f;--bar:#8a97a8;--hover:#eef3f8;--sheet:#fff;
font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
@media (prefers-color-scheme:dark){.strip{--ink:#e4e8ee;--dim:#9aa6b5;--rule:#2c343f;--A:#35b0a7;--G:#dba23f;
--bar:#6b788a;--hover:#222b36;--sheet:#1a1f27}}
.strip text{fill:var(--ink)}.strip .dim{fill:var(--dim)}.strip .num{font-variant-numeric:tabular-nums}
.strip .A{fill:var(--A)}.strip .G{fill:var(--G)}.strip .bar{fill:var(--bar)}.strip .rule{stroke:var(--rule)}
.strip .sheet{fill:var(--sheet)}.strip .hit{fill:transparent}
.strip a:hover .hit,.strip a:focus .hit{fill:var(--hover)}
.strip a:focus{outline:none}.strip a:focus-visible .hit{stroke:var(--A);stroke-width:2}
.strip .head{font-weight:600}.strip .mono{font-family:ui-monospace,Consolas,monospace;font-size:11px}
"""


def strip(plan: Plan, *, page: str = "") -> str:
    """The drawing.

    page: the file that its links open; empty for the page that it is part of, whose width the drawing takes
    and whose script gives texts at the right all the room there is.
    """
    rows, sums = layer_rows(plan, forward_order(plan), collapse=True), totals(plan)
    skips = [row for found in skip_rows(plan.skipped).values() for row in found]
    frame = _frame(rows, skips, sums, page)
    parts, y = [_header(frame)], _TOP
    for row in rows:
        height = max([_ROW, *(math.ceil(side_of(f.dim, frame.largest)) + 6 for f in row.factors[0])])
        parts.append(_row(row, y, height, frame, sums))
        y += height
    if skips:
        parts.append(text_at(_LABEL, y + 30, "Skipped: plain gradient, no preconditioner", "head"))
        y += 40
    for skip in skips:
        parts.append(_skip(skip, y, frame))
        y += _ROW
    width = frame.width
    sheet = f'<rect class="sheet" width="100%" height="{y + 10}"/>' if page else ""
    scaled = f'viewBox="0 0 {width} {y + 10}"' if page else ""
    title = f"{plan.capture.model_name}, method {plan.method.name}: layers and their factors"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="strip" width="{width}" height="{y + 10}" '
        f'{scaled} role="group" aria-label="{escaped(title)}">'
        f"<style>{_STYLE}</style>{sheet}{''.join(parts)}</svg>"
    )


def _frame(rows: Sequence[LayerRow], skips: Sequence[SkipRow], sums: Totals, page: str) -> Frame:
    longest = max(map(len, [*map(_label, rows), *map(_skip_label, skips)]), default=0)
    return Frame(
        width=WIDTH if page else LEAST_WIDTH,
        shift=max(0, int(_A - 20 - _LABEL - PROPORTIONAL * longest - _GAP)),
        page=page,
        largest=max((f.dim for row in rows for f in row.factors[0]), default=1),
        most=(
            max((row.total.state_bytes for row in rows), default=0) or 1,
            max((per_step(row.total, sums) for row in rows), default=0.0) or 1.0,
        ),
    )


def _label(row: LayerRow) -> str:
    return shortened(row.label, 42) + (f"  x{row.count}" if row.count > 1 else "")


def _skip_label(skip: SkipRow) -> str:
    return shortened(skip.label, 42) + (f"  x{len(skip.members)}" if len(skip.members) > 1 else "")


def per_step(cost: Cost, sums: Totals) -> float:
    """FLOPs per step, averaged over the schedule."""
    inversion = cost.inversion / sums.inverse_every if sums.inverse_every else 0.0
    return cost.apply + cost.statistics / sums.statistics_every + inversion


def side_of(dim: int, largest: int) -> float:
    """Side of the square, in pixels, whose area is proportional to the dimension."""
    return max(2.0, _SIDE * math.sqrt(dim / largest))


def size_words(factor: FactorSpec) -> str:
    """`65 x 65`, `8 of 9 x 9`, `vector of 1000`, `65 x 32`."""
    if factor.diagonal:
        return f"vector of {factor.dim}"
    times = f"{factor.count} of " if factor.count > 1 else ""
    return f"{times}{factor.dim} x {factor.dim if factor.columns is None else factor.columns}"


def key_link(key: str) -> str:
    """The part of an address that opens a layer."""
    return f"#layer/{quote(key, safe='')}"


def shortened(text: str, room: int) -> str:
    """At most `room` characters; the middle is left out."""
    if len(text) <= room:
        return text
    half = (room - 2) // 2
    return f"{text[: room - 2 - half]}..{text[len(text) - half :]}"


def _header(frame: Frame) -> str:
    """Names of the columns and the scale."""
    names = (
        (_A, "A", "middle"),
        (_G, "G or F", "middle"),
        (_SIZES, "sizes", ""),
        (_STATE + _NUMBER, "state, bytes", "end"),
        (_WORK + _NUMBER, "FLOPs per step", "end"),
        (_SOURCE, "source", ""),
    )
    beside = (text_at(x, _TOP - 10, name, "dim", place=place) for x, name, place in names)
    texts = [text_at(_LABEL, _TOP - 10, "layer", "dim"), frame.beside("".join(beside))]
    shown, x = [text_at(_LABEL, 34, "Scale, dimension d:", "dim")], 150.0
    for dim in _scale(frame.largest):
        side = side_of(dim, frame.largest)
        shown.append(rect("bar", x + side / 2, 48 - side / 2, side, side, 1.0))
        shown.append(text_at(x + side + 5, 34, str(dim), "num"))
        x += side + 22 + 8 * len(str(dim))
    shown.append(text_at(max(x + 10, _A), 34, _SCALE, "dim"))
    rule = f'<line class="rule" x1="0" x2="100%" y1="{_TOP - 2}" y2="{_TOP - 2}"/>'
    return "".join([*shown, *texts, rule])


def _scale(largest: int) -> list[int]:
    """Up to three round dimensions to compare with."""
    top = 2 ** int(math.log2(max(largest, 1)))
    return sorted({max(top // 16, 1), max(top // 4, 1), top})


def _row(row: LayerRow, y: int, height: int, frame: Frame, sums: Totals) -> str:
    match, middle = row.first, y + height / 2
    factors = [factor for factor in row.factors[0] if factor.side in "AGF"]
    shapes = [_factor(factor, middle, frame.largest) for factor in factors]
    sizes = ", ".join(f"{f.side} {'shared' if f.shared_with else size_words(f)}" for f in factors)
    state, work = row.total.state_bytes, per_step(row.total, sums)
    source = f"{match.source}  {match.source.code}" if match.source else ""
    cells = [
        *shapes,
        text_at(_SIZES, middle + 4, cut(sizes, 34), "num dim"),
        bar(_STATE, middle, state / frame.most[0]),
        text_at(_STATE + _NUMBER, middle + 4, bytes_text(state), "num", place="end"),
        bar(_WORK, middle, work / frame.most[1]),
        text_at(_WORK + _NUMBER, middle + 4, flops_text(round(work)), "num", place="end"),
        frame.open_text(_SOURCE, middle + 4, source, "mono dim"),
    ]
    name = f"{row.label}: {match.kind}, {sizes or 'no factor'}"
    return (
        f'<a href="{escape(frame.page + key_link(match.key))}" data-key="{escaped(match.key)}" '
        f'aria-label="{escaped(name)}"><title>{_exact(row, sums)}</title>'
        f'<rect class="hit" y="{y}" width="100%" height="{height}" rx="3"/>'
        f"{text_at(_LABEL, middle + 4, _label(row), '')}{frame.beside(''.join(cells))}</a>"
    )


def _factor(factor: FactorSpec, middle: float, largest: int) -> str:
    """A square; several behind each other; a line for a vector; a narrow rectangle for a thin factor."""
    side = side_of(factor.dim, largest)
    width = side if factor.columns is None else side_of(min(factor.columns, factor.dim), largest)
    css, centre = ("A", _A) if factor.side == "A" else ("G", _G)
    if factor.diagonal:
        return rect(css, centre, middle, 3.0, side, 1.0)
    behind = [(6.0, 0.25), (3.0, 0.5)] if factor.count > 1 else []
    borrowed = 0.4 if factor.shared_with else 1.0
    shapes = [rect(css, centre + shift, middle - shift, width, side, fade) for shift, fade in behind]
    return "".join([*shapes, rect(css, centre, middle, width, side, borrowed)])


def _skip(skip: SkipRow, y: float, frame: Frame) -> str:
    numel, reason = sum(member.numel for member in skip.members), skip.reason.value
    title = f"{skip.label}: {reason}, {skip.detail}; {counted(numel, 'element')}. {skip.reason.advice}"
    why = "   ".join(filter(None, (skip.detail, skip.sources)))
    cells = text_at(_A - 20, y + 15, reason, "dim") + frame.open_text(_SIZES, y + 15, why, "dim")
    label = text_at(_LABEL, y + 15, _skip_label(skip), "dim")
    return f"<g><title>{escaped(title)}</title>{label}{frame.beside(cells)}</g>"


def _exact(row: LayerRow, sums: Totals) -> str:
    """What hovering shows: exact numbers."""
    lines = [row.label + (f" ({row.count} layers alike; costs of all)" if row.count > 1 else "")]
    lines += [f"{f.side}: {size_words(f)}, {f.bytes:,} bytes each" for f in row.factors[0]]
    cost = row.total
    lines.append(f"state {cost.state_bytes:,} bytes")
    lines.append(f"statistics {cost.statistics:,}, refresh {cost.inversion:,}, apply {cost.apply:,} FLOPs")
    lines.append(f"per step {round(per_step(cost, sums)):,} FLOPs on average")
    return "\n".join(map(escaped, lines))
