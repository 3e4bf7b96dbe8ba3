"""`kfac-fx verify TARGET`."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any

import typer

from kfac_fx import verification
from kfac_fx.report.table import make_console
from kfac_fx.target import load_target
from kfac_fx.verification.terminal import show
from kfac_fx_cli.common import (
    Excluded,
    FisherName,
    MethodName,
    NoColor,
    SharingName,
    TargetText,
    app,
    clean_errors,
)

VIOLATED = 4


@app.command()
def verify(
    target: TargetText,
    method: MethodName = "kfac",
    fisher: FisherName = "empirical",
    sharing: SharingName = "expand",
    exclude: Excluded = None,
    float64: Annotated[
        bool,
        typer.Option(
            "--float64/--own-dtype", help="Run in float64 where the model does, or in its own dtype."
        ),
    ] = True,
    json: Annotated[
        bool, typer.Option("--json", help="Print the verdicts as JSON and nothing else.")
    ] = False,
    no_color: NoColor = False,
) -> None:
    """Check every layer of the model against plain PyTorch and explicit formulas; exit 4 on a violation.

    Gradients, statistics by explicit im2col, directions by dense algebra, one update, all on copies.
    """
    with clean_errors():
        with contextlib.redirect_stdout(sys.stderr):
            found = _verified(target, method, fisher, sharing, exclude, float64)
        if json:
            typer.echo(verification.to_json(found))
        else:
            show(found, make_console(no_color=no_color))
    if not found.ok:
        raise typer.Exit(VIOLATED)


def _verified(
    target: str, method: str, fisher: Any, sharing: Any, exclude: list[str] | None, float64: bool
) -> verification.Verification:
    loaded = load_target(target)
    return verification.verify(
        loaded.model,
        loaded.loss_fn,
        loaded.inputs,
        loaded.targets,
        method=method,
        fisher=fisher,
        sharing=sharing,
        exclude=tuple(exclude or ()),
        float64=float64,
    )
