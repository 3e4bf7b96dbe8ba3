"""Some training steps on a copy of a model, and the files of what its factors then are.

Enters: a model with a batch. Leaves: a `StepReport` with eigenvalues; a plot, or a JSON document.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kfac_fx
from kfac_fx import guards
from kfac_fx.contracts import Method
from kfac_fx.errors import KfacFxError
from kfac_fx.live import StepReport
from kfac_fx.outfile import check_writable, writing
from kfac_fx.spectra.plot import draw
from kfac_fx.target import Target

ENDINGS = (".png", ".svg", ".json")


def collect(
    target: Target,
    *,
    method: str | Method,
    steps: int,
    layers: str,
    max_dim: int,
    options: Mapping[str, Any],
) -> StepReport:
    """Train a copy on the target's batch, and report. options: those of `kfac_fx.compile`.

    Raises:
        KfacFxError: of the kind that `compile`, a step or the report names.
    """
    if steps < 1:
        raise KfacFxError(f"steps={steps} collects no statistics: use at least 1.")
    model = guards.copied(target.model, "spectrum")
    step = kfac_fx.compile(model, target.loss_fn, method=method, **options)
    for _ in range(steps):
        step(target.inputs, target.targets)
    return step.report(layers=layers, max_dim=max_dim)


def check_file(file: Path) -> None:
    """Raise `KfacFxError` if `save` could not write there: to be asked before the training."""
    check_writable(file, endings=ENDINGS)


def save(report: StepReport, file: Path, *, title: str) -> None:
    """Write the plot, or for a name in .json the document with all eigenvalues."""
    check_file(file)
    with writing(file):
        if file.suffix == ".json":
            file.write_text(report.to_json(eigenvalues=True) + "\n", encoding="utf-8")
        else:
            draw(report, file, title=title)
