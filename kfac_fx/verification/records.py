"""What a verification found: checks of the whole model and of each layer. Numbers and words only.

A check is ok, violated or not checked with a reason; nothing that was not computed twice is called ok.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, final

from kfac_fx.planned import Plan
from kfac_fx.types import LayerMatch

Status = Literal["ok", "violated", "not checked"]


@final
@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison of this library's result with an independent one.

    error: largest difference relative to the size of what is compared; None: not checked, for `reason`.
    tolerance: largest error that is rounding. detail: where the largest error is, or what was compared.
    nothing: there is nothing to compare, which is ok.
    """

    name: str
    error: float | None = None
    tolerance: float = 0.0
    reason: str = ""
    detail: str = ""
    nothing: bool = False

    @property
    def status(self) -> Status:
        """Not a number counts as violated."""
        if self.error is None:
            return "not checked"
        return "ok" if self.error <= self.tolerance else "violated"


@final
@dataclass(frozen=True, kw_only=True)
class LayerVerdict:
    """One layer. rows: whether its rows were recorded at the user's module or read from the graph."""

    layer: LayerMatch
    rows: Literal["module", "graph"]
    checks: tuple[Check, ...]

    @property
    def status(self) -> Status:
        """The worst of its checks."""
        return worst(self.checks)


@final
@dataclass(frozen=True, kw_only=True)
class Verification:
    """All verdicts on one model and batch. `print(verification)` is the report.

    layers: in forward order. precision: the dtype in which everything ran. note: why that one. seconds: of
    wall clock.
    """

    plan: Plan
    whole: tuple[Check, ...]
    layers: tuple[LayerVerdict, ...]
    precision: str
    note: str
    seconds: float
    render: Callable[[Verification], str] = field(repr=False)

    @property
    def violations(self) -> tuple[Check, ...]:
        """Checks that failed, of the whole model first."""
        every = [*self.whole, *(check for layer in self.layers for check in layer.checks)]
        return tuple(check for check in every if check.status == "violated")

    @property
    def ok(self) -> bool:
        """Whether nothing is violated; parts may be not checked."""
        return not self.violations

    def __str__(self) -> str:
        """The report, as `kfac-fx verify` prints it."""
        return self.render(self)


def worst(checks: tuple[Check, ...]) -> Status:
    """Violated before not checked before ok."""
    found = {check.status for check in checks}
    if "violated" in found:
        return "violated"
    return "ok" if found == {"ok"} else "not checked"
