"""The table of layers: its cells, and the lines that draw them.

Enters: a plan's layers. Leaves: strings. Costs are those of all layers of a row, so that columns add up to
the totals; A, G and rows are those of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kfac_fx.planned import Plan
from kfac_fx.report.comments import in_comment
from kfac_fx.report.lines import GAP, Line, cut, cut_path, fitted, natural_widths, total_width
from kfac_fx.report.numbers import bytes_text, flops_text
from kfac_fx.report.rows import LayerRow, gram_form, layer_rows
from kfac_fx.types import FactorSpec, LayerMatch

COLUMNS: tuple[str, ...] = (
    "layer", "kind", "x", "uses", "A", "G", "form", "rows", "state", "stats", "refresh", "apply", "source",
)  # fmt: skip
LEFT_ALIGNED = frozenset({"layer", "kind", "form", "source"})
SOURCE_WIDTH = 48
TOTAL = "total"

_SHORTEST_SOURCE = 16
_SHORTEST_LAYER = 24
_CUT_FIRST = ("apply", "refresh")
_CUT_LAST = ("form", "stats", "uses", "rows", "kind", "state", "x")


def layer_cells(plan: Plan, layers: Sequence[LayerMatch], *, collapse: bool) -> list[list[str]]:
    """Cells of the table, one list per line: column names, these layers, totals.

    Columns that would say nothing (one use each, no convolution) are empty, their names too.
    """
    rows = layer_rows(plan, layers, collapse=collapse)
    costs = [row.total for row in rows]
    sums = (
        bytes_text(sum(cost.state_bytes for cost in costs)),
        flops_text(sum(cost.statistics for cost in costs)),
        flops_text(sum(cost.inversion for cost in costs)),
        flops_text(sum(cost.apply for cost in costs)),
    )
    header, body = list(COLUMNS), [_cells(row) for row in rows]
    uses, form = COLUMNS.index("uses"), COLUMNS.index("form")
    if all(cells[uses] == "1" for cells in body):
        header[uses] = ""
        for cells in body:
            cells[uses] = ""
    if not any(cells[form] for cells in body):
        header[form] = ""
    return [header, *body, [TOTAL, "", f"{len(layers):,}", "", "", "", "", "", *sums, ""]]


def fitting_columns(cells: Sequence[Sequence[str]], *, width: int | None) -> dict[str, int]:
    """Columns to show, with widths, for where not all fit.

    Layers take a third at most, the source is shortened, then left out, then apply, then refresh.
    """
    widths = natural_widths(COLUMNS, cells)
    if width is not None and "layer" in widths and total_width(widths) > width:
        widths["layer"] = min(widths["layer"], max(_SHORTEST_LAYER, width // 3))
    return fitted(
        widths,
        width,
        shorten={"source": _SHORTEST_SOURCE},
        drop=_CUT_FIRST,
        least={"layer": _SHORTEST_LAYER},
        drop_late=_CUT_LAST,
    )


def hidden_columns(cells: Sequence[Sequence[str]], *, width: int | None) -> list[str]:
    """Columns that say something and that do not fit."""
    fits = fitting_columns(cells, width=width)
    return [name for name in natural_widths(COLUMNS, cells) if name not in fits]


def table_lines(cells: Sequence[Sequence[str]], *, width: int | None) -> list[Line]:
    """The table: the roles of cells are their columns' names, of header and totals "head"."""
    fits = fitting_columns(cells, width=width)
    lines = []
    for number, texts in enumerate(cells):
        is_layer = 0 < number < len(cells) - 1
        pieces = []
        for name, text in zip(COLUMNS, texts, strict=True):
            if name in fits:
                short = (cut_path if name == "layer" else cut)(text, fits[name])
                padded = short.ljust(fits[name]) if name in LEFT_ALIGNED else short.rjust(fits[name])
                pieces += [(GAP, ""), (padded, name if is_layer else "head")]
        lines.append(tuple(pieces[1:]))
    return lines


def _cells(row: LayerRow) -> list[str]:
    match, cost = row.first, row.total
    source = in_comment(f"{match.source}  {match.source.code.strip()}") if match.source else ""
    sides = {factor.side: position for position, factor in enumerate(row.factors[0])}

    def size(side: str) -> str:
        if side not in sides:
            return "-"
        return _size([factors[sides[side]] for factors in row.factors])

    forms = [gram_form(match, factor) for factor in row.factors[0]]
    return [
        in_comment(row.label),
        match.kind,
        f"{row.count:,}",
        str(len(match.uses)),
        size("A"),
        f"F {size('F')}" if "F" in sides else size("G"),
        next(filter(None, forms), "").replace("other", "-"),
        _range([member.rows for member in row.members], lambda number: f"{number:,}"),
        bytes_text(cost.state_bytes),
        flops_text(cost.statistics),
        flops_text(cost.inversion),
        flops_text(cost.apply),
        cut(source, SOURCE_WIDTH),
    ]


def _size(factors: Sequence[FactorSpec]) -> str:
    """`65^2`: a square factor; `8x9^2`: eight of them; `1000`: a vector; `65/32`: 32 columns of length 65.

    A star marks a shared one. factors: of the layers of one row; what differs is given as a range.
    """
    first = factors[0]
    side = _range([factor.dim for factor in factors]) + ("" if first.diagonal else "^2")
    if first.columns is not None:
        side = f"{first.dim}/{first.columns}"
    count = _range([factor.count for factor in factors])
    return ("" if count == "1" else f"{count}x") + side + ("*" if first.shared_with else "")


def _range(numbers: Sequence[int], text: Callable[[int], str] = str) -> str:
    least, most = min(numbers), max(numbers)
    return text(least) if least == most else f"{text(least)}-{text(most)}"
