"""What a method must offer, what it is offered, and the `Plan` that joins both with a captured model.

Protocols have no code; `Plan` is frozen and the only thing that report, instrument and lower read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor

from kfac_fx.types import Capture, FactorSpec, Fisher, LayerMatch, Matches, Refreshed, Sharing, Skip, State


class Statistics(Protocol):
    """What a layer kind offers to a method for one match, as traced tensors (methods.md 1.3
    normalisation).
    """

    @property
    def structure(self) -> str:
        """The match's structure."""
        ...

    def input_moment(self, *, swapped: bool = False) -> Tensor:
        """A: [groups, d_in, d_in], or [groups * d_in] for a diagonal structure."""
        ...

    def output_moment(self, *, swapped: bool = False) -> Tensor:
        """G: [groups, d_out, d_out]."""
        ...

    def blocks(self) -> Tensor:
        """F: [channels, k, k] of a block structure."""
        ...


@runtime_checkable
class Method(Protocol):
    """One curvature method: hyper-parameters and pure functions on tensors. Knows no fx and no layer kind."""

    @property
    def name(self) -> str:
        """The method's name on the command line."""
        ...

    @property
    def statistics_every(self) -> int:
        """Steps between two updates of the statistics."""
        ...

    @property
    def inverse_every(self) -> int:
        """Steps between two refreshes of the inverses."""
        ...

    @property
    def shared_names(self) -> frozenset[str]:
        """State tensors that depend on the layer's input alone.

        Kept once for layers that read the same input.
        """
        ...

    @property
    def max_factor_dim(self) -> int:
        """Largest side length of a dense factor; larger layers are skipped."""
        ...

    def base_optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The published base optimizer."""
        ...

    def init(self, match: LayerMatch, *, dtype: torch.dtype, device: torch.device) -> State:
        """State of one layer before any statistics."""
        ...

    def statistics_names(self, match: LayerMatch) -> tuple[str, ...]:
        """Names of the state tensors that a batch contributes to. Names of input factors start with "A"."""
        ...

    def batch_statistics(self, statistics: Statistics, names: Sequence[str]) -> State:
        """What one batch contributes, for these names."""
        ...

    def moving_average(self, state: State, batch: State, *, weight: Tensor) -> State:
        """Fold a batch's statistics into the state. weight: 0-dim share of the new batch."""
        ...

    def new_weight(self, count: int) -> float:
        """Share of the newest batch in the moving average after `count` earlier updates."""
        ...

    def refresh(self, states: Mapping[str, State]) -> tuple[dict[str, State], Refreshed]:
        """New inverses for all layers (the changed tensors alone), and what happened."""
        ...

    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        """Apply the inverse to the canonical gradient [groups, d_out, d_in], or [channels, k] for blocks."""
        ...

    def rescale(
        self, directions: list[Tensor], gradients: list[Tensor], *, learning_rates: Tensor
    ) -> list[Tensor]:
        """Bound or restore the length of the update. learning_rates: [layers]."""
        ...

    def factors(self, match: LayerMatch, *, dtype: torch.dtype) -> tuple[FactorSpec, ...]:
        """What is stored per layer and what it costs."""
        ...


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """The decision for one captured model: the only thing that report, instrument and lower read."""

    capture: Capture
    matches: Matches
    method: Method
    factors: tuple[FactorSpec, ...]
    fisher: Fisher
    sharing: Sharing
    model_flops: int
    render: Callable[[Plan], str] = field(repr=False)

    @property
    def matched(self) -> tuple[LayerMatch, ...]:
        """Layers that are preconditioned."""
        return self.matches.matched

    @property
    def skipped(self) -> tuple[Skip, ...]:
        """Parameters left to the base optimizer, with reasons."""
        return self.matches.skipped

    @property
    def coverage(self) -> float:
        """Share of trainable parameter elements that are matched, in [0, 1]."""
        total = sum(p.numel for p in self.capture.parameters if p.trainable)
        return sum(m.numel for m in self.matched) / total if total else 1.0

    def __str__(self) -> str:
        """The report, as `kfac-fx inspect` prints it."""
        return self.render(self)
