"""`kfac-fx inspect TARGET`."""

from __future__ import annotations

from typing import Annotated

import typer

from kfac_fx import report
from kfac_fx.errors import Reason
from kfac_fx.report.table import make_console, show
from kfac_fx_cli.common import (
    Excluded,
    FisherName,
    MethodName,
    NoColor,
    SharingName,
    TargetText,
    Without,
    app,
    clean_errors,
    load,
)


@app.command()
def inspect(
    target: TargetText,
    method: MethodName = "kfac",
    fisher: FisherName = "empirical",
    sharing: SharingName = "expand",
    exclude: Excluded = None,
    without: Without = None,
    layer: Annotated[str | None, typer.Option(help="Only layers that fit this pattern, one by one.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 2 if a parameter is skipped.")] = False,
    skipped: Annotated[bool, typer.Option("--skipped", help="Add advice about what is skipped.")] = False,
    no_color: NoColor = False,
) -> None:
    """Show which layers would be preconditioned, at what cost, and why others are not."""
    with clean_errors():
        _, plan = load(
            target, method=method, fisher=fisher, sharing=sharing, exclude=exclude, without=without
        )
        if json:
            if layer is not None or skipped:
                typer.echo("warning: --layer and --skipped have no effect on --json", err=True)
            typer.echo(report.to_json(plan))
        else:
            show(plan, make_console(no_color=no_color), skipped=skipped, layer=layer)
    if strict and any(skip.reason is not Reason.FROZEN for skip in plan.skipped):
        raise typer.Exit(2)
