"""A benchmark as a JSON document, schema `kfac_fx.bench/1`: milliseconds, bytes and ratios, keys sorted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import torch

from kfac_fx.bench.records import BenchReport, ContenderReport, Tuned
from kfac_fx.report.document import plain

SCHEMA = "kfac_fx.bench/1"
NOTES = {
    "time": "Milliseconds of wall time. Contenders took turns, each with a copy of the model, on one batch.",
    "mean, median, slowest": "Of `steps` consecutive steps at the schedule, from the one after a refresh.",
    "amortised": "Computed: the median of each kind of step, as often as a period of the schedule has it.",
    "stall": "The slowest kind of step, by its median, over the median step of a period.",
    "ratios": "Mean over SGD's mean; median and slowest over SGD's median; amortised over SGD's amortised.",
    "compile": "Seconds of capture, compilation and the first run of each kind of step.",
    "of phases": "Computed: the sum of the phases per step, averaged over the schedule.",
    "phases": "forward+backward: the program without curvature. precondition: the program with it less that."
    " statistics, with the moving averages: the program with both less the one before. refresh, update: by"
    " themselves. per_step: averaged over the schedule.",
    "memory": "Bytes of tensors. held: between steps. peaks: what one step of each kind allocates beside it."
    " over_plain: (held by SGD + peak of a statistics step) / (held by SGD + peak of SGD's step).",
    "autotune": "Forms of A as plans run them. chosen: by the cost model. Methods were timed with the best.",
}


def document(report: BenchReport) -> dict[str, Any]:
    """Everything that was measured, and what follows from it."""
    content = {
        "schema": SCHEMA,
        "notes": NOTES,
        "torch": torch.__version__,
        "model": report.model,
        "batch": report.batch,
        "device": report.device,
        "backend": report.backend,
        "threads": report.threads,
        "steps": report.steps,
        "warmup": report.warmup,
        "refresh": report.refresh,
        "left_out": report.left_out,
        "contenders": [_contender(report, entry) for entry in report.contenders],
        "autotune": None if report.tuned is None else [_tuned(entry) for entry in report.tuned],
    }
    return plain(content)


def to_json(report: BenchReport) -> str:
    """The document as indented text."""
    return json.dumps(document(report), indent=2, sort_keys=True, allow_nan=False)


def _contender(report: BenchReport, entry: ContenderReport) -> dict[str, Any]:
    memory = entry.memory
    return {
        "label": entry.label,
        "statistics_every": entry.every[0] if entry.every else None,
        "inverse_every": entry.every[1] if entry.every else None,
        "period": entry.period,
        "compile_seconds": entry.compile_seconds,
        "mean": 1e3 * entry.mean,
        "median": 1e3 * entry.median,
        "slowest": 1e3 * entry.slowest,
        "slowest_over_median": entry.slowest / entry.median,
        "amortised": 1e3 * entry.amortised,
        "of_phases": None if entry.of_phases is None else 1e3 * entry.of_phases,
        "stall": entry.stall,
        "ratios": report.ratios(entry),
        "steps": _milliseconds(entry.seconds),
        "kinds": {
            kind.name: {
                "per_period": kind.per_period,
                "median": 1e3 * kind.median,
                "steps": _milliseconds(kind.seconds),
            }
            for kind in entry.kinds
        },
        "phases": {
            phase.name: {"each": 1e3 * phase.seconds, "share": phase.share, "per_step": 1e3 * phase.per_step}
            for phase in entry.phases
        },
        "memory": memory
        and {**dataclasses.asdict(memory), "peak": memory.peak, "over_plain": report.memory_ratio(entry)},
    }


def _milliseconds(seconds: Iterable[float]) -> list[float]:
    return [1e3 * each for each in seconds]


def _tuned(entry: Tuned) -> dict[str, Any]:
    return {
        "layers": entry.layers,
        "examples": entry.examples,
        "channels": entry.channels,
        "device": entry.device,
        "geometry": dataclasses.asdict(entry.geometry),
        "estimates": {form: 1e3 * each for form, each in entry.estimates.items()},
        "milliseconds": {form: 1e3 * each for form, each in entry.seconds.items()},
        "chosen": entry.chosen,
        "best": entry.best,
        "loss": entry.loss,
    }
