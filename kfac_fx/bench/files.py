"""The files of `kfac-fx bench -o`: the JSON document, and a plot where matplotlib is installed.

Enters: a report and a path. Leaves: files, and their paths.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from kfac_fx.bench.document import to_json
from kfac_fx.bench.records import PHASES, BenchReport
from kfac_fx.errors import KfacFxError

_COLORS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7")
_REST = "#BBBBBB"


def check_files(file: Path) -> None:
    """Raise `KfacFxError` if `save` could not write there: to be asked before a long measurement."""
    if file.suffix not in (".json", ".png"):
        raise KfacFxError(f"cannot write {file}: its name must end in .json or .png.")
    if file.suffix == ".png" and not _has_matplotlib():
        raise KfacFxError(
            f'cannot draw {file}: matplotlib is not installed. Run pip install ".[benchmarks]", or name a '
            ".json file."
        )
    document = file.with_suffix(".json")
    there = document.exists()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with document.open("a", encoding="utf-8"):
            pass
        if not there:
            document.unlink()
    except OSError as error:
        raise KfacFxError(f"cannot write {file}: {error.strerror}. Choose another file.") from error


def save(report: BenchReport, file: Path) -> tuple[Path, ...]:
    """Write `file` as .json and, if matplotlib is installed, as .png; their paths."""
    check_files(file)
    document, picture = file.with_suffix(".json"), file.with_suffix(".png")
    try:
        document.write_text(to_json(report) + "\n", encoding="utf-8")
        if not _has_matplotlib():
            return (document,)
        draw(report, picture)
    except OSError as error:
        raise KfacFxError(f"cannot write {file}: {error.strerror}. Choose another file.") from error
    return document, picture


def _has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(report: BenchReport, file: Path) -> None:
    """One bar per contender: its phases per step of the schedule, up to its amortised step time."""
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(2.5 + 1.3 * len(report.contenders), 4.5), layout="constrained"
    )
    axes = figure.subplots()
    positions = list(range(len(report.contenders)))
    bottoms = [0.0] * len(positions)
    for name, color in zip(PHASES, _COLORS, strict=True):
        phases = ({phase.name: phase for phase in entry.phases} for entry in report.contenders)
        heights = [1e3 * found[name].per_step if name in found else 0.0 for found in phases]
        axes.bar(positions, heights, bottom=bottoms, color=color, label=name, width=0.6)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    rest = [
        max(0.0, 1e3 * entry.amortised - bottom)
        for entry, bottom in zip(report.contenders, bottoms, strict=True)
    ]
    axes.bar(positions, rest, bottom=bottoms, color=_REST, label="not attributed", width=0.6)
    for position, entry in zip(positions, report.contenders, strict=True):
        top, ratio = max(1e3 * entry.amortised, bottoms[position]), report.ratios(entry)["amortised"]
        axes.annotate(f"{ratio:.2f}x", (position, top), ha="center", va="bottom")
    labels = [
        e.label if e.every is None else f"{e.label}\n{e.every[0]}/{e.every[1]}" for e in report.contenders
    ]
    axes.set_xticks(positions, labels=labels)
    axes.set_ylabel("milliseconds per step, averaged over the schedule")
    axes.set_title(f"{report.model} on {report.device}, ratio to SGD")
    axes.margins(y=0.1)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(file, dpi=150)
