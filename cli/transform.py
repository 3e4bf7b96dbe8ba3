"""`kfac-fx transform TARGET -o DIR`."""

from __future__ import annotations

from pathlib import Path

import typer

from kfac_fx import export
from kfac_fx.report.table import make_console, show
from kfac_fx_cli.common import (
    Excluded,
    FisherName,
    MethodName,
    NoColor,
    OutputFolder,
    SharingName,
    TargetText,
    Without,
    app,
    clean_errors,
    load,
)


@app.command()
def transform(
    target: TargetText,
    method: MethodName = "kfac",
    output: OutputFolder = Path("kfac_fx_out"),
    fisher: FisherName = "empirical",
    sharing: SharingName = "expand",
    exclude: Excluded = None,
    without: Without = None,
    no_color: NoColor = False,
) -> None:
    """Write the transformed training programs and the report into a folder."""
    with clean_errors():
        loaded, plan = load(
            target, method=method, fisher=fisher, sharing=sharing, exclude=exclude, without=without
        )
        files = export.save(plan, loaded, output)
        show(plan, make_console(no_color=no_color))
    typer.echo("")
    for file in files:
        typer.echo(f"saved {file}")
