"""`kfac-fx transform TARGET -o DIR`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import typer

from kfac_fx import export
from kfac_fx.errors import ExportWarning
from kfac_fx.planned import Plan
from kfac_fx.report.table import make_console, show
from kfac_fx.target import Target
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
        export.check_folder(output)
        loaded, plan = load(
            target, method=method, fisher=fisher, sharing=sharing, exclude=exclude, without=without
        )
        files = _saved(plan, loaded, output)
        show(plan, make_console(no_color=no_color))
    typer.echo("")
    typer.echo(f"saved {len(files)} files in {output}")
    for name, holds in _TO_OPEN.items():
        if any(name == file.split("/")[0] for file in files):
            typer.echo(f"  {output / name}{'/' if name == 'passes' else ''}  {holds}")


_TO_OPEN = {
    "index.html": "the report as a page",
    "passes": "the program after each pass",
    "train_step.py": "the step as one file that needs torch alone",
    "report.json": "the report for programs",
}


def _saved(plan: Plan, target: Target, folder: Path) -> list[str]:
    """Write the folder. Returns the names of the files that are whole; of others a warning is on stderr."""
    broken: set[str] = set()

    def warned(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if isinstance(message, ExportWarning):
            broken.add(message.file)
            typer.echo(f"warning: {message}", err=True)
        else:
            shown(message, category, *rest)

    with warnings.catch_warnings():
        warnings.simplefilter("always", ExportWarning)
        shown, warnings.showwarning = warnings.showwarning, warned
        files = export.save(plan, target, folder)
    return [name for name in (file.relative_to(folder).as_posix() for file in files) if name not in broken]
