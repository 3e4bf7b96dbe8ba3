"""What a training step notes as it goes: its losses, the time of each kind of step, the length of the update.

Enters: calls of the step. Leaves: notes that a report reads. Nothing here waits for a device: on CUDA losses
stay there and times are events.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, final

import torch
from torch import Tensor

from kfac_fx.captures import Captures
from kfac_fx.live.records import Timed
from kfac_fx.planned import Plan
from kfac_fx.progress import Progress
from kfac_fx.stages import runs

KEPT = 100  # losses, and steps of each kind

PROGRAM_PHASES = {
    "plain": "forward, backward, precondition",
    "statistics": "forward, backward, statistics, precondition",
    "gradients": "forward, backward",
    "batch_statistics": "forward, backward, statistics",
}

Mark = float | torch.cuda.Event
Span = tuple[Mark, Mark]
P = ParamSpec("P")
R = TypeVar("R")


@final
@dataclass(frozen=True, kw_only=True)
class Length:
    """Of the preconditioned gradients V of one step.

    products, rates: <V, grad> and learning rate of each layer, [layers], where the step left them. bounded:
    whether the method bounded or restored the length of V. step: its number, from 1.
    """

    products: Tensor
    rates: Tensor
    bounded: bool
    step: int

    def value(self) -> float:
        """lr^2 <V, grad> over all layers; waits for the device."""
        return float((self.products * self.rates.to(self.products) ** 2).sum())


@final
@dataclass(kw_only=True)
class Times:
    """Of what happens again and again: how often, and the marks of the calls of each of the last times."""

    count: int = 0
    spans: deque[list[Span]] = field(default_factory=lambda: deque(maxlen=KEPT))

    def add(self, calls: list[Span]) -> None:
        """It happened once more."""
        self.count += 1
        self.spans.append(calls)

    def read(self, name: str) -> Timed:
        """As a record of seconds; waits for the device."""
        return Timed(name=name, count=self.count, seconds=tuple(map(_seconds, self.spans)))


@final
class Journal:
    """Notes of one training step.

    losses: the last ones that were returned. kinds, phases: times of each kind of step and of each phase.
    length: of the last update with preconditioned gradients. refreshed: step of each layer's last refresh.
    """

    def __init__(self, progress: Progress, captures: Captures, *, device: torch.device) -> None:
        self._progress = progress
        self._captures = captures
        self._on_cuda = device.type == "cuda"
        self.forget()

    def forget(self) -> None:
        """Start anew: after a saved state was loaded."""
        self.losses: deque[Tensor] = deque(maxlen=KEPT)
        self.kinds: defaultdict[str, Times] = defaultdict(Times)
        self.phases: defaultdict[str, Times] = defaultdict(Times)
        self.length: Length | None = None
        self.refreshed: dict[str, int] = {}
        self._open: list[Span] = []
        self._first_run = False
        self._see()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around one call of the step; one that raises leaves no note."""
        progress, length = self._progress, self.length
        if progress.pending is None:
            self._open, self._first_run = [], False
        start, steps, programs = self._mark(), progress.steps, self._captures.num_compiled
        try:
            yield
        except BaseException:
            self.length = length
            raise
        self._open.append((start, self._mark()))
        self._first_run |= self._captures.num_compiled != programs
        if progress.steps != steps:
            self._close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a phase of a step. A program's first run, with its compilation, is not noted."""
        start, programs = self._mark(), self._captures.num_compiled
        yield
        if self._captures.num_compiled == programs:
            self.phases[name].add([(start, self._mark())])

    def measure(self, plan: Plan, products: Tensor | None, rates: Tensor | None) -> None:
        """Note <V, grad> and learning rate of each layer of this step, [layers]; None: there are none."""
        if products is None or rates is None:
            return
        bounded, step = runs("lengths", plan.without), self._progress.steps + 1
        self.length = Length(products=products, rates=rates, bounded=bounded, step=step)

    def _close(self) -> None:
        """An update was made: which kind of step it was, and how long it took."""
        curvature = self._progress.curvature
        refreshed = curvature.refreshes != self._refreshes
        kind = (
            "refresh" if refreshed else "statistics" if curvature.statistics != self._statistics else "plain"
        )
        if refreshed:
            for key, count in curvature.refreshes.items():
                if count != self._refreshes.get(key, 0):
                    self.refreshed[key] = self._progress.steps
        if kind != "plain":
            self._see()
        self.kinds["first run" if self._first_run else kind].add(self._open)
        self._open, self._first_run = [], False

    def _see(self) -> None:
        self._refreshes = dict(self._progress.curvature.refreshes)
        self._statistics = dict(self._progress.curvature.statistics)

    def _mark(self) -> Mark:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class HasJournal(Protocol):
    """Anything with a journal."""

    _journal: Journal


def journaled(function: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """A method whose calls, and the losses that they return, its object's journal notes."""

    @functools.wraps(function)
    def noted(self: HasJournal, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._journal.call():
            result = function(self, *args, **kwargs)
            loss = result.clone() if isinstance(result, Tensor) else None  # the user may change their own
        if loss is not None:
            self._journal.losses.append(loss)
        return result

    return noted


def _seconds(spans: list[Span]) -> float:
    """How long these calls took, together; waits for them on CUDA."""
    total = 0.0
    for start, end in spans:
        if isinstance(start, torch.cuda.Event):
            assert isinstance(end, torch.cuda.Event), "both marks are of one kind"
            end.synchronize()
            total += start.elapsed_time(end) / 1e3
        else:
            assert isinstance(end, float), "both marks are of one kind"
            total += end - start
    return total
