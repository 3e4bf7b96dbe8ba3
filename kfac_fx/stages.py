"""The passes of the pipeline by name: timed, logged, and those that can be switched off for debugging.

Enters: names. Leaves: records, lines of the logger `kfac_fx.passes`, and the set of passes that are off.
Knows no graph. `KFAC_FX_LOGS=passes` prints the lines (`+passes`: a line per layer too), and
`KFAC_FX_WITHOUT=forms,...` switches passes off.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import final

from kfac_fx.errors import UnknownNameError, did_you_mean

LOGGER = logging.getLogger("kfac_fx.passes")
LOGS_VARIABLE, WITHOUT_VARIABLE = "KFAC_FX_LOGS", "KFAC_FX_WITHOUT"

PASSES = {
    "capture": "forward, loss and backward passes as one graph",
    "match": "each trainable parameter is a layer's, or is skipped with a reason",
    "plan": "what is kept for each layer, and what it costs",
    "guard": "1/R_, and one number that is finite if all gradients are",
    "statistics": "this batch's factors, beside the backward that makes what they read",
    "averages": "moving averages of the factors",
    "precondition": "each layer's gradient becomes a direction",
    "lengths": "the length of the update is bounded or restored (KL clip, norms)",
    "products": "<V, grad> of each layer, for the KL of step.report()",
    "cleanup": "dead code and unread state go; views may copy",
    "lower": "graph to callable; off: eager",
    "forms": "the fastest form of each convolution's A; off: patches",
    "stacks": "small layers of equal shape are preconditioned in one call; off: one by one",
    "equal-layers": "equal layers are traced once; off: each is traced, and none stacked",
}
_NEEDED = {
    "capture": "every later pass reads its graph",
    "match": "every later pass reads its layers",
    "plan": "every later pass reads its decisions",
    "guard": "a step decides by it whether its results may be used",
    "cleanup": "the program is not correct for all strides without it",
}
SWITCHABLE_PASSES = tuple(name for name in PASSES if name not in _NEEDED)
_READS = {
    "averages": "statistics",
    "lengths": "precondition",
    "products": "precondition",
    "stacks": "equal-layers",
}  # a pass without anything to work on is off too

_OFF: ContextVar[frozenset[str]] = ContextVar("off", default=frozenset())


@final
@dataclass(frozen=True, kw_only=True)
class PassRecord:
    """One run of a pass. before, after: numbers of nodes. did: what it matched or inserted, in words."""

    name: str
    seconds: float
    before: int
    after: int
    did: str

    def __str__(self) -> str:
        """The line that is logged."""
        nodes = f"{self.before:>6} -> {self.after:>6} nodes"
        return f"{self.name:<12} {self.seconds:8.3f} s  {nodes}  {self.did}"


@final
class Running:
    """A pass while it runs. did, nodes: set by the pass, for its record."""

    def __init__(self, nodes: Sized) -> None:
        self.before = len(nodes)
        self.nodes = nodes
        self.did = ""
        self.record: PassRecord | None = None


@contextmanager
def running(name: str, nodes: Sized = ()) -> Iterator[Running]:
    """Time and log what happens inside as the pass `name`. nodes: of the graph that it reads or changes."""
    assert name in PASSES, f"{name} is no pass"
    found, start = Running(nodes), time.perf_counter()
    try:
        yield found
    except BaseException as error:
        passed = time.perf_counter() - start
        LOGGER.info("%-12s %8.3f s  failed: %s", name, passed, type(error).__name__)
        raise
    found.record = PassRecord(
        name=name,
        seconds=time.perf_counter() - start,
        before=found.before,
        after=len(found.nodes),
        did=found.did,
    )
    LOGGER.info("%s", found.record)


def note_off(name: str, of: str) -> None:
    """Log that a pass does not run. of: the program that it would have written."""
    LOGGER.info("%-12s %10s  %s", name, "off", of)


def note(name: str, text: str) -> None:
    """Log what a pass could not do."""
    LOGGER.info("%-12s %10s  %s", name, "", text)


def detail(name: str, layer: str, text: str, *values: object) -> None:
    """What a pass did for one layer; a line on the level DEBUG. text: with places for `values`."""
    LOGGER.debug(f"%-12s %s: {text}", name, layer, *values)


@contextmanager
def without_passes(*names: str) -> Iterator[None]:
    """Steps that are compiled, and models that are inspected, inside are so without these passes.

    They are remembered: a step traces at its first call, which may be outside. For debugging: which pass
    changes the result? `kfac_fx.SWITCHABLE_PASSES` are the names. Raises `UnknownNameError`.
    """
    token = _OFF.set(_OFF.get() | checked(names, "without_passes"))
    try:
        yield
    finally:
        _OFF.reset(token)


def switched_off() -> frozenset[str]:
    """The passes that are off here, by `without_passes` and by the environment. Raises `UnknownNameError`."""
    names = (name.strip() for name in os.environ.get(WITHOUT_VARIABLE, "").split(","))
    return _OFF.get() | checked([name for name in names if name], WITHOUT_VARIABLE)


def checked(names: Iterable[str], where: str) -> frozenset[str]:
    """The set of these names, if all are passes that can be off. where: for the message."""
    found = frozenset(names)
    for name in sorted(found):
        if name in _NEEDED:
            others = ", ".join(SWITCHABLE_PASSES)
            raise UnknownNameError(
                f"{where}: the pass {name!r} cannot be switched off: {_NEEDED[name]}. These can: {others}."
            )
        if name not in PASSES:
            hint = did_you_mean(name, SWITCHABLE_PASSES)
            raise UnknownNameError(f"{where}: there is no pass {name!r}.{hint}")
    return found


def runs(name: str, without: frozenset[str]) -> bool:
    """Whether a pass runs: it is not off, nor is the one whose results it reads."""
    reads = _READS.get(name)
    return name not in without and (reads is None or runs(reads, without))


def log_as_asked() -> None:
    """Print the log where the environment asks for it: `KFAC_FX_LOGS=passes`, or `+passes` for each layer."""
    wanted = [name.strip() for name in os.environ.get(LOGS_VARIABLE, "").split(",") if name.strip()]
    unknown = [name for name in wanted if name.removeprefix("+") != "passes"]
    if unknown:
        hint = did_you_mean(unknown[0].removeprefix("+"), ["passes", "+passes"])
        warnings.warn(f"{LOGS_VARIABLE}: there is no log {unknown[0]!r}.{hint}", stacklevel=2)
    if len(unknown) == len(wanted) or any(h.name == LOGS_VARIABLE for h in LOGGER.handlers):
        return
    handler = logging.StreamHandler()
    handler.name = LOGS_VARIABLE
    handler.setFormatter(logging.Formatter("[kfac_fx] %(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.DEBUG if "+passes" in wanted else logging.INFO)
    LOGGER.propagate = False
