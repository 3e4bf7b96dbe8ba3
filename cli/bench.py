"""`kfac-fx bench TARGET`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from kfac_fx import bench as benchmark
from kfac_fx.report.table import make_console
from kfac_fx.target import load_target
from kfac_fx_cli.common import Excluded, FisherName, NoColor, SharingName, TargetText, app, clean_errors


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
    with clean_errors():
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
