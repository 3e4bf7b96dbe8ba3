"""What a benchmark found, as frozen records. Times are in seconds; every derived figure is a property."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from kfac_fx.estimates import Form
from kfac_fx.forms import Case
from kfac_fx.layout import Geometry

BASELINE = "sgd"
PHASES = ("forward+backward", "statistics", "refresh", "precondition", "update")


@final
@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of step: "plain", "statistics", "refresh" (with statistics) or "refresh alone".

    per_period: how many of them one period of the schedule has. seconds: of each that was timed.
    """

    name: str
    per_period: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds of a typical one."""
        return statistics.median(self.seconds)


@final
@dataclass(frozen=True, kw_only=True)
class Phase:
    """One part of a step. seconds: each time that it runs. share: of the steps in which it runs."""

    name: str
    seconds: float
    share: float

    @property
    def per_step(self) -> float:
        """Seconds per step, averaged over the schedule."""
        return self.seconds * self.share


@final
@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of tensors. held: between steps (parameters, buffers, optimizer, curvature).

    peaks: the most that a step of each kind allocates beside them.
    """

    held: int
    peaks: Mapping[str, int]

    @property
    def peak(self) -> int:
        """The most at any time."""
        return self.held + max(self.peaks.values())


@final
@dataclass(frozen=True, kw_only=True)
class ContenderReport:
    """One contender. every: steps between statistics, and between refreshes (0: none); None without any.

    seconds: of consecutive steps at the schedule, from the one after a refresh. memory: None where it cannot
    be measured.
    """

    label: str
    every: tuple[int, int] | None
    compile_seconds: float
    seconds: tuple[float, ...]
    kinds: tuple[Kind, ...]
    phases: tuple[Phase, ...]
    memory: Memory | None

    @property
    def schedule(self) -> str:
        """`1/10`: steps between statistics and between refreshes, `10/-` without refreshes; or nothing."""
        return "" if self.every is None else f"{self.every[0]}/{self.every[1] or '-'}"

    @property
    def mean(self) -> float:
        """Mean of the consecutive steps."""
        return statistics.fmean(self.seconds)

    @property
    def median(self) -> float:
        """Median of the consecutive steps."""
        return statistics.median(self.seconds)

    @property
    def slowest(self) -> float:
        """Slowest of the consecutive steps."""
        return max(self.seconds)

    @property
    def period(self) -> int:
        """Steps after which the schedule repeats."""
        return sum(kind.per_period for kind in self.kinds)

    @property
    def amortised(self) -> float:
        """Computed mean over a period: the median of each kind, as often as the schedule has it."""
        return sum(kind.median * kind.per_period for kind in self.kinds) / self.period

    @property
    def period_median(self) -> float:
        """Computed median over a period, from the medians of the kinds."""
        seen, half = 0, math.ceil(self.period / 2)
        for kind in sorted(self.kinds, key=lambda kind: kind.median):
            seen += kind.per_period
            if seen >= half:
                return kind.median
        raise AssertionError("a period has steps")

    @property
    def of_phases(self) -> float | None:
        """Computed mean over a period: the sum of the phases per step; None without phases."""
        return sum(phase.per_step for phase in self.phases) if self.phases else None

    @property
    def stall(self) -> float:
        """The slowest kind of step relative to the median over a period."""
        return max(kind.median for kind in self.kinds) / self.period_median


@final
@dataclass(frozen=True, kw_only=True)
class Tuned:
    """One geometry of convolutions. layers: their names. device: its type. estimates, seconds: by form."""

    layers: tuple[str, ...]
    examples: int
    channels: int
    device: str
    geometry: Geometry
    estimates: Mapping[Form, float]
    seconds: Mapping[Form, float]

    @property
    def case(self) -> Case:
        """What the choice depends on."""
        return self.geometry, self.examples, self.channels, self.device

    @property
    def chosen(self) -> Form:
        """The form that the cost model picks."""
        return min(self.estimates, key=self.estimates.__getitem__)

    @property
    def best(self) -> Form:
        """The form that was fastest."""
        return min(self.seconds, key=self.seconds.__getitem__)

    @property
    def loss(self) -> float:
        """Time of the chosen form relative to the best: 1 if they are the same."""
        return self.seconds[self.chosen] / self.seconds[self.best]


@final
@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """All contenders, SGD first.

    device: its name. threads: of torch on the CPU. refresh: of `kfac_fx.compile`. left_out: peers that did
    not run, and why. tuned: what `autotune` found; methods then use the fastest forms.
    """

    model: str
    batch: tuple[tuple[int, ...], ...]
    device: str
    backend: str
    threads: int
    warmup: int
    refresh: str
    contenders: tuple[ContenderReport, ...]
    left_out: Mapping[str, str]
    tuned: tuple[Tuned, ...] | None

    @property
    def steps(self) -> int:
        """Consecutive steps of each."""
        return len(self.baseline.seconds)

    @property
    def baseline(self) -> ContenderReport:
        """SGD, to which all ratios relate."""
        return self.contender(BASELINE)

    def contender(self, label: str) -> ContenderReport:
        """The contender of this label."""
        return next(entry for entry in self.contenders if entry.label == label)

    def ratios(self, entry: ContenderReport) -> dict[str, float]:
        """Mean over SGD's mean; median and slowest over SGD's median; amortised over SGD's amortised."""
        return {
            "mean": entry.mean / self.baseline.mean,
            "median": entry.median / self.baseline.median,
            "slowest": entry.slowest / self.baseline.median,
            "amortised": entry.amortised / self.baseline.amortised,
        }

    def memory_ratio(self, entry: ContenderReport) -> float | None:
        """Peak of a statistics step, less what the entry holds beyond SGD (the state), over SGD's peak.

        Of the kind "statistics", else of the largest kind. None where memory is not known.
        """
        memory, plain = entry.memory, self.baseline.memory
        if memory is None or plain is None:
            return None
        step = memory.peaks.get("statistics", max(memory.peaks.values()))
        return (plain.held + step) / plain.peak
