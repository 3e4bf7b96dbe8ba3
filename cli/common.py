"""What the commands share: the application, arguments and options, and how an error of the user ends."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import kfac_fx
from kfac_fx.errors import KfacFxError
from kfac_fx.lower import BACKENDS
from kfac_fx.planned import Plan
from kfac_fx.target import Target, load_target

app = typer.Typer(
    name="kfac-fx",
    help="Put Kronecker-factored curvature into the training graph of any PyTorch model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

TargetText = Annotated[
    str,
    typer.Argument(metavar="TARGET", help="file.py[:factory] or package.module:factory."),
]
MethodName = Annotated[str, typer.Option("--method", "-m", help="Curvature method; see `kfac-fx methods`.")]
FisherName = Annotated[str, typer.Option("--fisher", help="empirical, mc or type2.")]
SharingName = Annotated[str, typer.Option("--sharing", help="expand or reduce.")]
Excluded = Annotated[
    list[str] | None,
    typer.Option("--exclude", help="Parameter pattern to leave out; repeatable."),
]
Without = Annotated[
    list[str] | None,
    typer.Option("--without", metavar="PASS", help="Switch a pass off, for debugging; repeatable."),
]
BackendName = Annotated[str, typer.Option("--backend", help=f"Of compiled steps: {', '.join(BACKENDS)}.")]
RefreshName = Annotated[
    str, typer.Option("--refresh", help="Inverses: together, or staggered over the period.")
]
OutputFolder = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")]
NoColor = Annotated[bool, typer.Option("--no-color", help="Plain text; the variable NO_COLOR does the same.")]


def load(
    target: str,
    *,
    method: str,
    fisher: Any,
    sharing: Any,
    exclude: list[str] | None,
    without: list[str] | None = None,
) -> tuple[Target, Plan]:
    """Load and inspect. What the user's code prints goes to stderr, so that stdout is the report alone."""
    with contextlib.redirect_stdout(sys.stderr), kfac_fx.without_passes(*(without or ())):
        loaded = load_target(target)
        plan = kfac_fx.inspect(
            loaded.model,
            loaded.loss_fn,
            loaded.inputs,
            loaded.targets,
            method=method,
            fisher=fisher,
            sharing=sharing,
            exclude=tuple(exclude or ()),
        )
    return loaded, plan


@contextlib.contextmanager
def clean_errors() -> Iterator[None]:
    """An error of the user is a message on stderr and exit code 1, without a traceback."""
    try:
        yield
    except KfacFxError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
