"""The report of a training step as a frozen record: text, a flat dict of numbers, JSON.

Enters: what `observe` found. Leaves: strings and plain numbers. Times are in seconds.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from kfac_fx.live.health import FactorHealth, LayerHealth
from kfac_fx.report.document import plain

SCHEMA = "kfac_fx.live/1"
FIGURES = ("condition", "damped_condition", "effective_rank", "residual")


@final
@dataclass(frozen=True, kw_only=True)
class Timed:
    """A kind of step, or a part of one that runs alone. count: since the start. seconds: of the last ones.

    Kinds: "plain", "statistics", "refresh", or "first run" (some program's first, with its compilation).
    Parts: a program, a refresh, an update.
    """

    name: str
    count: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of a typical one."""
        return statistics.median(self.seconds)


@final
@dataclass(frozen=True, kw_only=True)
class KL:
    """The length of an update in the metric of the curvature.

    value: lr^2 <V, grad> of the update V after the clip: what `kl_clip` bounds, and about twice the KL
    divergence that an update by lr V makes. clip: nu, what V was multiplied with; None for methods without.
    step: number of the step that it is of, the last one whose gradients were preconditioned.
    """

    value: float
    clip: float | None
    step: int


@final
@dataclass(frozen=True, kw_only=True)
class StepReport:
    """How training goes. Prints as one screen.

    steps: updates so far. losses: the last ones returned, oldest first. damping: lambda of the next step, in
    the method's units; None for a method without. gamma, reduction_ratio: as on the step. kl: of the last
    update; None with the reason in `kl_note`. retried, kept_last: of all refreshes. kinds:
    kinds of steps and their times. phases: parts of steps and their times; those inside one program have one
    time, and `kfac-fx bench` takes them apart. layers: in the order of the forward. left_out: names of layers
    with a factor larger than was asked for. state_bytes: of the curvature, all layers.
    """

    method: str
    steps: int
    losses: tuple[float, ...]
    damping: float | None
    gamma: float | None
    reduction_ratio: float | None
    kl: KL | None
    kl_note: str
    retried: int
    kept_last: int
    kinds: tuple[Timed, ...]
    phases: tuple[Timed, ...]
    layers: tuple[LayerHealth, ...]
    left_out: tuple[str, ...]
    max_dim: int
    state_bytes: int
    render: Callable[[StepReport], str] = field(repr=False, compare=False)

    def __str__(self) -> str:
        """One screen of text, layers in the order of the forward."""
        return self.render(self)

    def scalars(self) -> dict[str, float]:
        """Flat numbers for any logger: "loss/last", "condition/conv1.A" and so on.

        Times in milliseconds. What is not known is not there; nor are infinite conditions.
        """
        found: dict[str, float | None] = {
            "damping/lambda": self.damping,
            "damping/gamma": self.gamma,
            "damping/reduction_ratio": self.reduction_ratio,
            "refresh/retried": float(self.retried),
            "refresh/kept_last": float(self.kept_last),
        }
        if self.losses:
            found |= {"loss/last": self.losses[-1], "loss/mean": statistics.fmean(self.losses)}
        if self.kl is not None:
            found |= {"kl/value": self.kl.value, "kl/clip": self.kl.clip}
        found |= {f"time/{kind.name.replace(' ', '_')}_ms": 1e3 * kind.median for kind in self.kinds}
        found |= {
            f"phase/{'_'.join(phase.name.replace(',', '').split())}_ms": 1e3 * phase.median
            for phase in self.phases
        }
        for layer in self.layers:
            for factor in layer.factors:
                place = f"{layer.name}.{factor.side}"
                values = dataclasses.asdict(_without_eigenvalues(factor))
                found |= {f"{name}/{place}": _finite(values[name]) for name in FIGURES}
            if layer.since_refresh is not None:
                found[f"since_refresh/{layer.name}"] = float(layer.since_refresh)
        return {name: float(value) for name, value in found.items() if value is not None}

    def document(self, *, eigenvalues: bool = False) -> dict[str, Any]:
        """All fields as plain values; infinite ones as text. eigenvalues: with all of each factor."""
        names = ("method", "steps", "losses", "damping", "gamma", "reduction_ratio", "kl_note", "retried")
        names = (*names, "kept_last", "left_out", "max_dim", "state_bytes")
        parts = {
            "kl": None if self.kl is None else dataclasses.asdict(self.kl),
            "kinds": _times(self.kinds),
            "phases": _times(self.phases),
            "layers": [_layer(layer, eigenvalues) for layer in self.layers],
        }
        return plain({"schema": SCHEMA, **{name: vars(self)[name] for name in names}, **parts})

    def to_json(self, *, eigenvalues: bool = False) -> str:
        """The document as indented text."""
        document = self.document(eigenvalues=eigenvalues)
        return json.dumps(document, indent=2, sort_keys=True, allow_nan=False)


def _times(entries: Sequence[Timed]) -> dict[str, Any]:
    return {
        entry.name: {"count": entry.count, "milliseconds": [1e3 * each for each in entry.seconds]}
        for entry in entries
    }


def _layer(layer: LayerHealth, eigenvalues: bool) -> dict[str, Any]:
    factors = []
    for factor in layer.factors:
        values = dataclasses.asdict(_without_eigenvalues(factor))
        values["eigenvalues"] = factor.eigenvalues
        if not eigenvalues:
            del values["eigenvalues"]
        elif factor.eigenvalues is not None:
            values["eigenvalues"] = factor.eigenvalues.tolist()
        factors.append(values)
    names = ("name", "key", "group", "statistics", "refreshes", "since_refresh", "state_bytes")
    return {name: vars(layer)[name] for name in names} | {"factors": factors}


def _without_eigenvalues(factor: FactorHealth) -> FactorHealth:
    return dataclasses.replace(factor, eigenvalues=None)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
