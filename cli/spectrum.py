"""`kfac-fx spectrum TARGET`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from kfac_fx import spectra
from kfac_fx.target import load_target
from kfac_fx_cli.common import Excluded, FisherName, MethodName, SharingName, TargetText, app, clean_errors


@app.command()
def spectrum(
    target: TargetText,
    method: MethodName = "kfac",
    steps: Annotated[int, typer.Option(help="Training steps before, on the target's batch.")] = 10,
    fisher: FisherName = "empirical",
    sharing: SharingName = "expand",
    exclude: Excluded = None,
    layer: Annotated[str, typer.Option(help="Only layers that fit this pattern.")] = "*",
    max_dim: Annotated[int, typer.Option(help="Larger factors are left out: eigenvalues cost d^3.")] = 1024,
    json: Annotated[
        bool, typer.Option("--json", help="Print eigenvalues and figures as JSON and nothing else.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="FILE.png or .svg by matplotlib, or .json.  [spectrum.png]"
        ),
    ] = None,
) -> None:
    """Train a copy of the model for some steps and draw the eigenvalues of its factors.

    The method's base optimizer is used, at its published settings.
    """
    file = Path("spectrum.png") if output is None and not json else output
    with clean_errors():
        if file is not None:
            spectra.check_file(file)
        with contextlib.redirect_stdout(sys.stderr):
            report = spectra.collect(
                load_target(target),
                method=method,
                steps=steps,
                layers=layer,
                max_dim=max_dim,
                options={"fisher": fisher, "sharing": sharing, "exclude": tuple(exclude or ())},
            )
        if file is not None:
            spectra.save(report, file, title=target)
    typer.echo(report.to_json(eigenvalues=True) if json else str(report))
    if file is not None:
        typer.echo(f"saved {file}" if json else f"\nsaved {file}", err=json)
