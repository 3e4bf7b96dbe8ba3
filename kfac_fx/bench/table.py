"""A benchmark in a terminal: step times, kinds of steps, phases and, if asked for, forms of A.

Enters: a report, and a console. Leaves: nothing; it prints.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kfac_fx.bench.document import NOTES
from kfac_fx.bench.records import PHASES, BenchReport, Tuned
from kfac_fx.forms import words

_MIB = 2**20
_STEPS = "milliseconds per step and (ratio to sgd): {steps} consecutive steps of each, in turns"
_STEPS_NOTE = (
    "every: steps between statistics / refreshes. Ratios: mean over sgd's mean; median and slowest over its "
    "median. amortised: COMPUTED for a period of the schedule from the kinds below. stall: the slowest kind "
    "over the median of a period. peak: of tensors at any time (a statistics step's less the state, over "
    "sgd's). compile: capture, compilation, first runs."
)
_KINDS = "milliseconds of each kind of step (median) and how many of them a period of the schedule has"
_KINDS_NOTE = "A refresh step has statistics too, unless it is named alone."
_PHASES = "milliseconds of each phase when it runs, and (per step of the schedule)"
_FORMS = "A of convolutions: milliseconds of each form, measured (estimated)"
_FORMS_NOTE = (
    "chosen: by the cost model. The methods above were timed with the best. Estimates are of one core, and "
    "meant as ratios."
)


def show(report: BenchReport, console: Console) -> None:
    """Print all tables."""
    shapes = ", ".join("x".join(map(str, shape)) or "1" for shape in report.batch)
    where = f"{report.device}   backend {report.backend}   threads {report.threads}"
    where += "" if report.refresh == "together" else f"   refresh {report.refresh}"
    console.print(Text(f"kfac-fx bench  {report.model}   batch {shapes}   {where}", style="bold"))
    _print(console, _STEPS.format(steps=report.steps), _steps(report), _STEPS_NOTE)
    for label, why in report.left_out.items():
        console.print(Text(f"{label}: {why}"))
    _print(console, _KINDS, _kinds(report), _KINDS_NOTE)
    _print(console, _PHASES, _phases(report), NOTES["phases"])
    if report.tuned:
        _print(console, _FORMS, _forms(report.tuned), _FORMS_NOTE)
        console.print(Text(_verdict(report.tuned)))


def _print(console: Console, title: str, table: Table, note: str) -> None:
    console.print()
    console.print(Text(title, style="bold"))
    console.print(table)
    console.print(Text(note, style="dim"))


def _table(*, left: Iterable[str], right: Iterable[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in left:
        table.add_column(heading)
    for heading in right:
        table.add_column(heading, justify="right")
    return table


def _steps(report: BenchReport) -> Table:
    numbers = ["mean", "median", "slowest", "slowest/median", "amortised", "stall", "peak MiB", "compile s"]
    table = _table(left=["contender", "every"], right=numbers)
    for entry in report.contenders:
        ratios = report.ratios(entry)
        table.add_row(
            entry.label,
            entry.schedule,
            _with_ratio(entry.mean, ratios["mean"]),
            _with_ratio(entry.median, ratios["median"]),
            _with_ratio(entry.slowest, ratios["slowest"]),
            f"{entry.slowest / entry.median:.2f}",
            _with_ratio(entry.amortised, ratios["amortised"]),
            f"{entry.stall:.2f}",
            "-"
            if entry.memory is None
            else f"{entry.memory.peak / _MIB:.1f} ({report.memory_ratio(entry):.2f})",
            f"{entry.compile_seconds:.1f}",
        )
    return table


def _with_ratio(seconds: float, ratio: float) -> str:
    return f"{_milliseconds(seconds)} ({ratio:.2f})"


def _milliseconds(seconds: float) -> str:
    """At least three digits."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _kinds(report: BenchReport) -> Table:
    names = list(dict.fromkeys(kind.name for entry in report.contenders for kind in entry.kinds))
    table = _table(left=["contender"], right=[*names, "period"])
    for entry in report.contenders:
        cells = dict.fromkeys(names, "")
        cells |= {kind.name: f"{_milliseconds(kind.median)} x {kind.per_period}" for kind in entry.kinds}
        table.add_row(entry.label, *cells.values(), str(entry.period))
    return table


def _phases(report: BenchReport) -> Table:
    table = _table(left=["contender"], right=[*PHASES, "sum per step"])
    for entry in report.contenders:
        if not entry.phases:
            continue
        cells: dict[str, str] = dict.fromkeys(PHASES, "")
        for phase in entry.phases:
            rare = f" ({_milliseconds(phase.per_step)})" if phase.share < 1 else ""
            cells[phase.name] = _milliseconds(phase.seconds) + rare
        table.add_row(entry.label, *cells.values(), _milliseconds(entry.of_phases or 0.0))
    return table


def _forms(tuned: Sequence[Tuned]) -> Table:
    table = _table(left=["layers", "input and kernel", "chosen", "best"], right=["chosen/best"])
    table.add_column("forms")
    for entry in tuned:
        forms = "\n".join(
            f"{form} {_milliseconds(entry.seconds[form])} ({_milliseconds(entry.estimates[form])})"
            for form in sorted(entry.seconds, key=entry.seconds.__getitem__)
        )
        table.add_row(
            _layers(entry),
            _geometry(entry),
            words(entry.chosen, entry.geometry),
            words(entry.best, entry.geometry),
            f"{entry.loss:.2f}",
            forms,
        )
    return table


def _verdict(tuned: Sequence[Tuned]) -> str:
    """Where the cost model is wrong."""
    wrong = [entry for entry in tuned if entry.best != entry.chosen]
    if not wrong:
        return "The cost model chooses the fastest form everywhere."
    names = ", ".join(f"{_layers(entry)} ({entry.loss:.2f} times as long)" for entry in wrong)
    return f"The cost model does not choose the fastest form for {len(wrong)} of {len(tuned)}: {names}."


def _layers(entry: Tuned) -> str:
    return entry.layers[0] + (f" + {len(entry.layers) - 1}" if entry.layers[1:] else "")


def _geometry(entry: Tuned) -> str:
    """`64x32x32x32 k3x3 s2 p1`: input, kernel, and what is not the default of a convolution."""
    geometry = entry.geometry
    sizes = "x".join(map(str, (entry.examples, entry.channels, *geometry.space)))
    parts = [sizes, "k" + "x".join(map(str, geometry.kernel))]
    for letter, values, default in (
        ("s", geometry.stride, 1),
        ("p", geometry.padding, 0),
        ("d", geometry.dilation, 1),
        ("g", (geometry.groups,), 1),
    ):
        if any(value != default for value in values):
            parts.append(letter + "x".join(map(str, values if len(set(values)) > 1 else values[:1])))
    return " ".join([*parts, *(["transposed"] if geometry.transposed else [])])
