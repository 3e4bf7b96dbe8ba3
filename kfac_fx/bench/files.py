"""The files of `kfac-fx bench -o`: the JSON document, and a plot where matplotlib is installed.

Enters: a report and a path. Leaves: files, and their paths.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from kfac_fx.bench.document import to_json
from kfac_fx.bench.records import PHASES, BenchReport
from kfac_fx.outfile import can_draw, check_writable, writing

_COLORS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7")
_WHOLE = "#BBBBBB"
_WIDE, _THIN = 0.45, 0.2


def check_files(file: Path) -> None:
    """Raise `KfacFxError` if `save` could not write there: to be asked before a long measurement."""
    check_writable(file, endings=(".json", ".png"))
    for written in _files(file):
        check_writable(written, endings=(written.suffix,))


def save(report: BenchReport, file: Path) -> tuple[Path, ...]:
    """Write `file` as .json and, if matplotlib is installed, as .png; their paths."""
    check_files(file)
    document, *pictures = _files(file)
    with writing(document):
        document.write_text(to_json(report) + "\n", encoding="utf-8")
    for picture in pictures:
        with writing(picture):
            draw(report, picture)
    return document, *pictures


def _files(file: Path) -> tuple[Path, ...]:
    document, picture = file.with_suffix(".json"), file.with_suffix(".png")
    return (document, picture) if can_draw() else (document,)


def draw(report: BenchReport, file: Path) -> None:
    """Two bars per contender: its amortised step time, and beside it the phases, measured by themselves."""
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(3 + 1.4 * len(report.contenders), 4.5), layout="constrained"
    )
    axes = figure.subplots()
    positions = list(range(len(report.contenders)))
    amortised = [1e3 * entry.amortised for entry in report.contenders]
    axes.bar([p - _WIDE / 2 for p in positions], amortised, color=_WHOLE, label="whole step", width=_WIDE)
    bottoms = [0.0] * len(positions)
    for name, color in zip(PHASES, _COLORS, strict=True):
        phases = ({phase.name: phase for phase in entry.phases} for entry in report.contenders)
        heights = [1e3 * found[name].per_step if name in found else 0.0 for found in phases]
        beside = [p + _THIN / 2 for p in positions]
        axes.bar(beside, heights, bottom=bottoms, color=color, label=name, width=_THIN)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for position, entry, height in zip(positions, report.contenders, amortised, strict=True):
        ratio = f"{report.ratios(entry)['amortised']:.2f}x"
        axes.annotate(ratio, (position - _WIDE / 2, height), ha="center", va="bottom")
    labels = [f"{entry.label}\n{entry.schedule}".rstrip() for entry in report.contenders]
    axes.set_xticks(positions, labels=labels)
    axes.set_ylabel("milliseconds per step, averaged over the schedule")
    axes.set_title(f"{report.model} on {report.device}: amortised time, ratio to SGD's")
    axes.margins(y=0.1)
    figure.legend(loc="outside right upper", frameon=False, title="wide: a step, thin: its phases")
    figure.savefig(file, dpi=150)
