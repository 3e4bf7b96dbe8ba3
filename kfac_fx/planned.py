"""The `Plan`, which joins a method with a captured model: what report, instrument and lower read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

from kfac_fx.contracts import Method, rounds_rows
from kfac_fx.traced import Capture
from kfac_fx.types import FactorSpec, Fisher, LayerMatch, Matches, Sharing, Skip, State


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """The decision for one captured model: the only thing that report, instrument and lower read.

    model_flops: of forward and training backward. fisher_flops: of the further backward passes whose
    gradients the statistics read; 0 if the training backward's are read. without: names of the passes that
    are switched off. states: what `canonical.initial_state` has found out.
    """

    capture: Capture
    matches: Matches
    method: Method
    factors: tuple[FactorSpec, ...]
    fisher: Fisher
    sharing: Sharing
    model_flops: int
    fisher_flops: int
    render: Callable[[Plan], str] = field(repr=False)
    without: frozenset[str] = frozenset()
    states: dict[str, State] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def matched(self) -> tuple[LayerMatch, ...]:
        """Layers that are preconditioned."""
        return self.matches.matched

    @property
    def skipped(self) -> tuple[Skip, ...]:
        """Parameters left to the base optimizer, with reasons."""
        return self.matches.skipped

    @property
    def rounds_rows(self) -> bool:
        """Whether statistics are those of rows rounded to bfloat16."""
        return rounds_rows(self.method)

    @property
    def coverage(self) -> float:
        """Share of trainable parameter elements that are matched, in [0, 1]."""
        total = sum(p.numel for p in self.capture.parameters if p.trainable)
        return sum(m.numel for m in self.matched) / total if total else 1.0

    def __str__(self) -> str:
        """The report, as `kfac-fx inspect` prints it."""
        return self.render(self)
