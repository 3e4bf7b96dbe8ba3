"""The report of a `Plan` in a terminal, through rich: the cells of `text`, with colour and cut to the width.

Enters: a plan or the methods, and a console. Leaves: nothing; it prints. Output that goes to a file or a pipe
is never cut.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kfac_fx.contracts import Plan
from kfac_fx.report import text
from kfac_fx.report.rows import forward_order, totals

_STYLES = {"layer": "bold", "kind": "cyan", "A": "dark_cyan", "G": "dark_goldenrod", "source": "dim"}
_CUT_ORDER = ("apply", "invert")
_SHORTEST_SOURCE = 16
_WIDTH_OF_A_PIPE = 200


def make_console(*, no_color: bool = False) -> Console:
    """A console on stdout; plain when asked, when `NO_COLOR` is set and when stdout is no terminal."""
    plain = no_color or bool(os.environ.get("NO_COLOR"))
    console = Console(color_system=None if plain else "auto", highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH_OF_A_PIPE
    return console


def show(plan: Plan, console: Console, *, skipped: bool = False, layer: str | None = None) -> None:
    """Print the report. skipped: add advice. layer: only what fits this pattern, not collapsed."""
    layers, skips = (forward_order(plan), plan.skipped) if layer is None else text.select(plan, layer)
    title, *more = text.header_lines(plan)
    _print(console, title, style="bold")
    for line in more:
        _print(console, line)
    _print(console, "")
    if layers:
        cells = text.layer_cells(plan, layers, collapse=layer is None)
        _print_table(console, cells)
        for line in text.note_lines(cells):
            _print(console, line, style="dim")
    if skips:
        _print(console, "")
        _print(console, text.SKIPPED_TITLE, style="yellow")
        for line in text.skip_lines(skips, advice=skipped):
            _print(console, line, style="green" if line.lstrip().startswith(text.ADVICE_MARK) else "")
    if layer is None:
        _print(console, "")
        _print(console, text.cost_line(totals(plan)), style="bold")


def show_methods(methods: Mapping[str, type], console: Console) -> None:
    """Print one line per method: its schedule and damping by default, and the paper it comes from."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    settings = ("statistics_every", "inverse_every", "damping", "decay")
    table.add_column("name", style="bold", no_wrap=True)
    for setting in settings:
        table.add_column(setting.replace("_", " "), justify="right")
    table.add_column("what it is")
    table.add_column("paper", style="dim")
    for name, method in methods.items():
        defaults = dataclasses.asdict(method())
        summary = (method.__doc__ or "").strip().split("\n", 1)[0]
        table.add_row(
            name, *(str(defaults.get(setting, "-")) for setting in settings), summary, _paper(method)
        )
    console.print(table)


def fitting_columns(cells: Sequence[Sequence[str]], *, width: int) -> dict[str, int]:
    """Columns to show, with widths: the source is shortened, then left out, then apply, then invert."""
    widths = text.natural_widths(cells)

    def excess() -> int:
        return sum(widths.values()) + len(text.GAP) * (len(widths) - 1) - width

    if excess() > 0:
        widths["source"] -= excess()
        if widths["source"] < _SHORTEST_SOURCE:
            del widths["source"]
    for name in _CUT_ORDER:
        if excess() > 0:
            del widths[name]
    return widths


def _print_table(console: Console, cells: Sequence[Sequence[str]]) -> None:
    """The header and the totals in bold, the columns of the layers in their colours."""
    fits = fitting_columns(cells, width=console.width) if console.is_terminal else text.natural_widths(cells)
    for number, line in enumerate(cells):
        is_layer = 0 < number < len(cells) - 1
        padded = text.padded(line, fits)
        parts = [(part, _STYLES.get(name, "") if is_layer else "bold") for name, part in padded.items()]
        printed = Text(text.GAP).join(Text(part, style=style) for part, style in parts)
        printed.rstrip()
        console.print(printed, soft_wrap=True, highlight=False)


def _print(console: Console, line: str, *, style: str = "") -> None:
    """One line as it is: no markup, no guessing of colours, wrapped by the terminal only."""
    console.print(Text(line, style=style), soft_wrap=True, highlight=False)


def _paper(method: type) -> str:
    """The first work that the docstring of the method, or of its module, cites with an arXiv number."""
    documents = (method.__doc__ or "", sys.modules[method.__module__].__doc__ or "")
    cited = re.search(r"[^.;:()]+ \(?arXiv:[\w.]+\w\)?", " ".join("\n".join(documents).split()))
    return cited[0].strip() if cited else ""
