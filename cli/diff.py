"""`kfac-fx diff DIR_A DIR_B`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kfac_fx.report.difference import difference, difference_json
from kfac_fx.report.difference_text import difference_lines
from kfac_fx.report.saved import read_report
from kfac_fx.report.table import make_console, show_lines, width_of
from kfac_fx_cli.common import NoColor, app, clean_errors

DIFFERENT = 3


@app.command()
def diff(
    before: Annotated[Path, typer.Argument(metavar="DIR_A", help="Folder of `transform`, or a report.json.")],
    after: Annotated[Path, typer.Argument(metavar="DIR_B", help="The same, to compare with.")],
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit 3 if anything differs.")] = False,
    no_color: NoColor = False,
) -> None:
    """Compare two reports: layers, factors, costs, settings and skipped parameters that changed."""
    with clean_errors():
        found = difference(read_report(before), read_report(after))
    if json:
        typer.echo(difference_json(found))
    else:
        console = make_console(no_color=no_color)
        show_lines(difference_lines(found, names=(str(before), str(after)), width=width_of(console)), console)
    if exit_code and not found["same"]:
        raise typer.Exit(DIFFERENT)
