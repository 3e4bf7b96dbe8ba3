"""The command `kfac-fx`. Enters: a TARGET and options. Leaves: printed reports, files and an exit code.

Commands only call the library. Exit codes: 0 done; 1 an error of the user, in one message on stderr;
2 `--strict` and a trainable parameter is skipped.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import kfac_fx
from kfac_fx import bench as benchmark
from kfac_fx import report
from kfac_fx.contracts import Plan
from kfac_fx.errors import KfacFxError, Reason
from kfac_fx.instrument import instrument
from kfac_fx.methods import METHODS
from kfac_fx.report.table import make_console, show, show_methods
from kfac_fx.target import load_target

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
OutputFolder = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")]
NoColor = Annotated[bool, typer.Option("--no-color", help="Plain text; the variable NO_COLOR does the same.")]


@app.command()
def inspect(
    target: TargetText,
    method: MethodName = "kfac",
    fisher: FisherName = "empirical",
    sharing: SharingName = "expand",
    exclude: Excluded = None,
    layer: Annotated[str | None, typer.Option(help="Only layers that fit this pattern, one by one.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 2 if a parameter is skipped.")] = False,
    skipped: Annotated[bool, typer.Option("--skipped", help="Add advice about what is skipped.")] = False,
    no_color: NoColor = False,
) -> None:
    """Show which layers would be preconditioned, at what cost, and why others are not."""
    with _clean_errors():
        plan = _plan(target, method=method, fisher=fisher, sharing=sharing, exclude=exclude)
        if json:
            if layer is not None or skipped:
                typer.echo("warning: --layer and --skipped have no effect on --json", err=True)
            typer.echo(report.to_json(plan))
        else:
            show(plan, make_console(no_color=no_color), skipped=skipped, layer=layer)
    if strict and any(skip.reason is not Reason.FROZEN for skip in plan.skipped):
        raise typer.Exit(2)


@app.command()
def transform(
    target: TargetText,
    method: MethodName = "kfac",
    output: OutputFolder = Path("kfac_fx_out"),
    fisher: FisherName = "empirical",
    sharing: SharingName = "expand",
    exclude: Excluded = None,
    no_color: NoColor = False,
) -> None:
    """Write the transformed training programs and the report into a folder."""
    with _clean_errors():
        plan = _plan(target, method=method, fisher=fisher, sharing=sharing, exclude=exclude)
        programs = {
            "captured": plan.capture.graph,
            "plain": instrument(plan, "plain").module,
            "statistics": instrument(plan, "statistics").module,
        }
        files = report.save(plan, programs, output)
        show(plan, make_console(no_color=no_color))
    typer.echo("")
    for file in files:
        typer.echo(f"saved {file}")


@app.command()
def bench(
    target: TargetText,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="Curvature method; repeatable (default: kfac and nkfac)."),
    ] = None,
    fisher: FisherName = "empirical",
    sharing: SharingName = "expand",
    exclude: Excluded = None,
    steps: Annotated[int, typer.Option(help="Timed steps of each contender.")] = 30,
    period: Annotated[
        bool, typer.Option("--period", help="Instead of --steps: as many as the longest schedule's period.")
    ] = False,
    warmup: Annotated[int, typer.Option(help="Steps of each kind that do not count.")] = 3,
    statistics_every: Annotated[
        int | None, typer.Option(help="Steps between statistics (default: as published).")
    ] = None,
    inverse_every: Annotated[
        int | None, typer.Option(help="Steps between refreshes (default: as published).")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Torch's threads on the CPU (default: all).")] = None,
    backend: Annotated[str, typer.Option(help="auto, eager or inductor (then SGD and AdamW too).")] = "auto",
    refresh: Annotated[
        str, typer.Option(help="Inverses: together, or staggered over the period.")
    ] = "together",
    peers: Annotated[
        bool, typer.Option("--peers", help="Time singd and asdfghjkl too, where they are installed.")
    ] = False,
    autotune: Annotated[
        bool,
        typer.Option("--autotune", help="Measure each form of each convolution's A, and use the fastest."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write FILE.json, and FILE.png by matplotlib."),
    ] = None,
    no_color: NoColor = False,
) -> None:
    """Time training steps of methods against SGD and AdamW, in turns, each on a copy of the model.

    Steps, kinds of steps and phases, with ratios to SGD's; the slowest needs --period.

    Peak memory is that of tensors, without what libraries allocate inside.
    """
    with _clean_errors():
        if output is not None:
            benchmark.check_files(output)
        with contextlib.redirect_stdout(sys.stderr):
            loaded = load_target(target)
            found = benchmark.bench(
                loaded.model,
                loaded.loss_fn,
                loaded.inputs,
                loaded.targets,
                methods=method or benchmark.DEFAULT_METHODS,
                statistics_every=statistics_every,
                inverse_every=inverse_every,
                steps=None if period else steps,
                warmup=warmup,
                threads=threads,
                backend=backend,
                refresh=refresh,
                peers=peers,
                options={"fisher": fisher, "sharing": sharing, "exclude": tuple(exclude or ())},
                tune=autotune,
                say=lambda text: typer.echo(text, err=True),
            )
        if json:
            typer.echo(benchmark.to_json(found))
        else:
            benchmark.show(found, make_console(no_color=no_color))
        files = () if output is None else benchmark.save(found, output)
    for file in files:
        typer.echo(f"saved {file}", err=json)


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


def _plan(target: str, *, method: str, fisher: Any, sharing: Any, exclude: list[str] | None) -> Plan:
    """Load and inspect. What the user's code prints goes to stderr, so that stdout is the report alone."""
    with contextlib.redirect_stdout(sys.stderr):
        loaded = load_target(target)
        return kfac_fx.inspect(
            loaded.model,
            loaded.loss_fn,
            loaded.inputs,
            loaded.targets,
            method=method,
            fisher=fisher,
            sharing=sharing,
            exclude=tuple(exclude or ()),
        )


@contextlib.contextmanager
def _clean_errors() -> Iterator[None]:
    """An error of the user is a message on stderr and exit code 1, without a traceback."""
    try:
        yield
    except KfacFxError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
