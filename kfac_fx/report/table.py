"""The report of a `Plan` in a terminal, through rich: the cells of `text`, with colour and cut to the width.

Enters: a plan or the methods, and a console. Leaves: nothing; it prints. Output that goes to a file or a pipe
is cut only if the variable COLUMNS asks for a width.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kfac_fx.planned import Plan
from kfac_fx.report.lines import Line
from kfac_fx.report.methods import (
    NOTATION,
    SCHEDULE,
    MethodRow,
    method_rows,
    settings_text,
    value_text,
)
from kfac_fx.report.text import report_lines

# By the roles of pieces: columns of the table, kinds of lines, and what `kfac-fx diff` found.
STYLES = {
    "layer": "bold",
    "kind": "cyan",
    "A": "dark_cyan",
    "G": "dark_goldenrod",
    "source": "dim",
    "title": "bold",
    "head": "bold",
    "note": "dim",
    "skipped": "yellow",
    "advice": "green",
    "cost": "bold",
    "more": "dark_goldenrod",
    "less": "dark_cyan",
}
_METHOD_STYLES = {"paper": "dim", "stored": "cyan"}
_PHASES = ("statistics", "refresh", "apply")
_LEAST_FOR_FORMULAS = 80
_WIDTH_OF_A_PIPE = 200


def make_console(*, no_color: bool = False) -> Console:
    """A console on stdout; plain when asked, when `NO_COLOR` is set and when stdout is no terminal."""
    plain = no_color or bool(os.environ.get("NO_COLOR"))
    console = Console(color_system=None if plain else "auto", highlight=False)
    if not console.is_terminal and not _asked_width():
        console.width = _WIDTH_OF_A_PIPE
    return console


def show(plan: Plan, console: Console, *, skipped: bool = False, layer: str | None = None) -> None:
    """Print the report. skipped: add advice. layer: only what fits this pattern, not collapsed."""
    show_lines(report_lines(plan, width=width_of(console), advice=skipped, layer=layer), console)


def width_of(console: Console) -> int | None:
    """Characters per line: of a terminal, else what COLUMNS says; None, so that nothing is cut, without."""
    return console.width if console.is_terminal else _asked_width()


def _asked_width() -> int | None:
    """The variable COLUMNS, if it is a width."""
    text = os.environ.get("COLUMNS", "")
    return (int(text) if text.isdecimal() else 0) or None


def show_lines(lines: Iterable[Line], console: Console) -> None:
    """Print lines as they are: no markup, no guessing of colours, broken by nobody."""
    for pieces in lines:
        printed = Text.assemble(*((text, STYLES.get(role, "")) for text, role in pieces))
        printed.rstrip()
        console.print(printed, soft_wrap=True, highlight=False)


def show_methods(methods: Mapping[str, type[Any]], console: Console) -> None:
    """Print what each method is, stores and costs per layer, and its default settings."""
    rows = method_rows(methods)
    sections: tuple[tuple[tuple[str, ...], list[tuple[str, ...]]], ...] = (
        (("what it is", "paper"), [(row.summary, row.paper) for row in rows]),
        (("stored", *_PHASES), [_costs(row) for row in rows]),
        ((*SCHEDULE, "base optimizer"), [_schedule(row) for row in rows]),
        (("other settings",), [(settings_text(row.others),) for row in rows]),
    )
    longest = max(len(row.name) for row in rows)
    fits = not console.is_terminal or console.width >= _LEAST_FOR_FORMULAS
    for columns, cells in sections:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("method", style="bold", no_wrap=True, min_width=longest)
        for index, column in enumerate(columns):
            table.add_column(
                column.replace("_", " "),
                justify="right" if column in SCHEDULE else "left",
                style=_METHOD_STYLES.get(column, ""),
                overflow="fold",
                width=_formula_width([line[index] for line in cells]) if fits and column in _PHASES else None,
            )
        for row, line in zip(rows, cells, strict=True):
            table.add_row(row.name, *(Text(cell) for cell in line))
        console.print(table)
        console.print()
    console.print(Text(NOTATION, style="dim"))


def _costs(row: MethodRow) -> tuple[str, ...]:
    names, _, rest = row.stored.partition(": ")
    formula, _, note = rest.partition("; ")
    stored = "\n".join(filter(None, (names, unbroken(formula), note)))
    costs = (row.statistics, row.refresh, row.apply)
    return (stored, *(unbroken(cost).replace(" + ", "\n+ ") for cost in costs))


def _formula_width(cells: Sequence[str]) -> int:
    return max(len(line) for cell in cells for line in cell.split("\n"))


def _schedule(row: MethodRow) -> tuple[str, ...]:
    """The settings of `SCHEDULE`, a dash for those without effect; the base optimizer."""
    cells = [value_text(row.defaults.get(name) or "-") for name in SCHEDULE]
    return *cells, f"{row.optimizer}: {settings_text(row.optimizer_settings)}"


def unbroken(formula: str) -> str:
    """`2 n (d_A + d_G) + m` as `2n(d_A+d_G) + m`, so that a narrow cell breaks between terms only."""
    tight = re.sub(r"\([^()]*\)", lambda bracket: bracket[0].replace(" + ", "+"), formula)
    tight = re.sub(r"(?<![\w^])(\d+) (?=[a-z(])|(?<=\w) (?=\()", r"\1", tight)
    return re.sub(r"(?<=\w) (?=[a-z])", "*", tight)
