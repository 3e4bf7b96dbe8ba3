"""`kfac-fx methods`."""

from __future__ import annotations

from typing import Annotated

import typer

from kfac_fx import report
from kfac_fx.methods import METHODS
from kfac_fx.report.table import make_console, show_methods
from kfac_fx_cli.common import NoColor, app


@app.command()
def methods(
    json: Annotated[bool, typer.Option("--json", help="Print the table as JSON and nothing else.")] = False,
    no_color: NoColor = False,
) -> None:
    """List the curvature methods: paper, what they store and cost per layer, default settings."""
    if json:
        typer.echo(report.methods_json(METHODS))
    else:
        show_methods(METHODS, make_console(no_color=no_color))
