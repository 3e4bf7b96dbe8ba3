"""`kfac-fx bench TARGET`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kfac_fx import bench as benchmark
from kfac_fx.report.table import make_console
from kfac_fx.target import load_target
from kfac_fx_cli.common import (
    BackendName,
    Excluded,
    FisherName,
    NoColor,
    RefreshName,
    SharingName,
    TargetText,
    app,
    clean_errors,
)

Methods = Annotated[
    list[str] | None,
    typer.Option("--method", "-m", help="Curvature method; repeatable (default: kfac and nkfac)."),
]
Steps = Annotated[int, typer.Option(help="Timed steps of each contender.")]
Period = Annotated[
    bool, typer.Option("--period", help="Instead of --steps: as many as the longest schedule's period.")
]
Warmup = Annotated[int, typer.Option(help="Steps of each kind that do not count.")]
StatisticsEvery = Annotated[
    int | None, typer.Option(help="Steps between statistics (default: as published).")
]
InverseEvery = Annotated[int | None, typer.Option(help="Steps between refreshes (default: as published).")]
Threads = Annotated[int | None, typer.Option(help="Torch's threads on the CPU (default: all).")]
Peers = Annotated[
    bool, typer.Option("--peers", help="Time singd and asdfghjkl too, where they are installed.")
]
Autotune = Annotated[
    bool,
    typer.Option("--autotune", help="Measure each form of each convolution's A, and use the fastest."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]
OutputFiles = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write FILE.json, and FILE.png by matplotlib."),
]


@app.command()
def bench(
    target: TargetText,
    method: Methods = None,
    fisher: FisherName = "empirical",
    sharing: SharingName = "expand",
    exclude: Excluded = None,
    steps: Steps = 30,
    period: Period = False,
    warmup: Warmup = 3,
    statistics_every: StatisticsEvery = None,
    inverse_every: InverseEvery = None,
    threads: Threads = None,
    backend: BackendName = "auto",
    refresh: RefreshName = "together",
    peers: Peers = False,
    autotune: Autotune = False,
    json: AsJson = False,
    output: OutputFiles = None,
    no_color: NoColor = False,
) -> None:
    """Time training steps of methods against SGD and AdamW, in turns, each on a copy of the model.

    Steps, kinds of steps and phases, with ratios to SGD's; the slowest needs --period.

    With inductor SGD and AdamW are compiled too.

    Peak memory is that of tensors, without what libraries allocate inside.
    """
    options = {"fisher": fisher, "sharing": sharing, "exclude": tuple(exclude or ())}
    every = {"statistics_every": statistics_every, "inverse_every": inverse_every}
    how = {"threads": threads, "backend": backend, "refresh": refresh, "peers": peers, "tune": autotune}
    length = {"steps": None if period else steps, "warmup": warmup}
    methods = method or benchmark.DEFAULT_METHODS
    with clean_errors():
        if output is not None:
            benchmark.check_files(output)
        found = _measured(target, {"methods": methods, "options": options, **every, **how, **length})
        if json:
            typer.echo(benchmark.to_json(found))
        else:
            benchmark.show(found, make_console(no_color=no_color))
        files = () if output is None else benchmark.save(found, output)
    for file in files:
        typer.echo(f"saved {file}", err=json)


def _measured(target: str, settings: dict[str, Any]) -> benchmark.BenchReport:
    """Load and time. What the user's code prints goes to stderr, as what is being done does."""
    with contextlib.redirect_stdout(sys.stderr):
        loaded = load_target(target)
        return benchmark.bench(
            loaded.model,
            loaded.loss_fn,
            loaded.inputs,
            loaded.targets,
            **settings,
            say=lambda text: typer.echo(text, err=True),
        )
