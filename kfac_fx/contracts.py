"""What a method must offer, and what it is offered: protocols, which have no code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from kfac_fx.types import FactorSpec, LayerMatch, QuadraticSettings, Refreshed, State


class Statistics(Protocol):
    """What a layer kind offers to a method for one match, as traced tensors (methods.md 1.3
    normalisation).

    swapped: of the uses in which the weight is transposed (see `LayerMatch.tied`).
    """

    @property
    def structure(self) -> str:
        """The match's structure."""
        ...

    @property
    def match(self) -> LayerMatch:
        """The layer."""
        ...

    @property
    def positions(self) -> tuple[int, ...]:
        """T of each use."""
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

    def input_rows(self, *, reduced: bool, positions: Sequence[Tensor] | None = None) -> Tensor:
        """Rows X with X^T X = A: [groups, m, d_in]. Not for diagonal structures.

        reduced: one row per example (the mean over positions), else one per example and position.
        positions: indices to keep of each use's positions, reweighted so that the mean over all choices is A.
        """
        ...

    def output_rows(self, *, reduced: bool, positions: Sequence[Tensor] | None = None) -> Tensor:
        """Rows X with X^T X = G: [groups, m, d_out]; m counts the passes of the Fisher too.

        reduced: one row per example (the sum over positions).
        """
        ...

    def field_rows(self, *, reduced: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Of a convolution, patches summed over the kernel: [groups, m, C]; the trace of A without the bias'
        entry, and that entry: [groups] each. Rows are normalised as, and `reduced` is that of `input_rows`.
        """
        ...

    def squared_projections(self, input_basis: Tensor | None, output_basis: Tensor | None) -> Tensor:
        """Sum over examples (and passes) of (Q_G^T J Q_A)^2 / R_, J the gradient of one example's terms.

        input_basis, output_basis: Q_A [groups, d_in, d_in] and Q_G [groups, d_out, d_out], None for the
        identity. Returns [groups, d_out, d_in]: the exact diagonal of the layer's Fisher block in that basis.
        """
        ...

    def channel_moments(self) -> tuple[Tensor, Tensor]:
        """Mean [groups, C] and second moment [groups, C, C] of a convolution's input over its pixels."""
        ...


@runtime_checkable
class Method(Protocol):
    """One curvature method: hyper-parameters and pure functions on tensors. Knows no fx and no layer kind.

    State of a layer is a dict of tensors. Its statistics are those of a batch; `fold` puts them into the
    state. Names of tensors that concern the input alone start with "A".
    """

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
        """Steps between two refreshes of the inverses; 0 if the method has nothing to refresh."""
        ...

    @property
    def shared_names(self) -> frozenset[str]:
        """Statistics and state tensors that depend on the layer's input alone.

        Kept once for layers that read the same input.
        """
        ...

    @property
    def growing_names(self) -> frozenset[str]:
        """State tensors whose second axis may grow with the batch (rows of thin factors)."""
        ...

    @property
    def max_factor_dim(self) -> int:
        """Largest side length of a dense factor; larger layers are skipped."""
        ...

    def base_optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The published base optimizer."""
        ...

    def refuses(self, match: LayerMatch) -> str | None:
        """Why this layer is left to the optimizer, in words for the report; None if it is not."""
        ...

    def init(self, match: LayerMatch, *, dtype: torch.dtype, device: torch.device) -> State:
        """State of one layer before any statistics. Sizes that depend on the batch follow
        `match.state_rows`.
        """
        ...

    def statistics_names(self, match: LayerMatch) -> tuple[str, ...]:
        """Names of what a batch contributes. They need not be names of state tensors."""
        ...

    def batch_statistics(self, statistics: Statistics, names: Sequence[str], state: State) -> State:
        """What one batch contributes, for these names. state: the layer's state before this batch."""
        ...

    def join(self, name: str, first: Tensor, second: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        """The statistic of two batches as one: `weights[0] * first + weights[1] * second` if it is linear.

        weights: 0-dim; they sum to one for means, and are both one where losses add up.
        """
        ...

    def mean_over(self, match: LayerMatch, name: str) -> int:
        """How many rows of this batch the statistic `name` of the layer's input is a mean over."""
        ...

    def fold(self, state: State, batch: State, *, weight: Tensor, inverse_scale: Tensor) -> State:
        """Put a batch's statistics into the state; returns what changes.

        batch lacks those of `shared_names` that another layer owns. weight: 0-dim, `new_weight` of now.
        inverse_scale: 0-dim, 1/R_ of the batch's loss.
        """
        ...

    def new_weight(self, count: int) -> float:
        """Share of the newest batch in the moving average after `count` earlier updates."""
        ...

    def refresh(
        self, states: Mapping[str, State], *, counts: Mapping[str, int]
    ) -> tuple[dict[str, State], Refreshed]:
        """New inverses for all layers (the changed tensors alone), and what happened.

        counts: earlier refreshes of each layer. Tensors of `shared_names` are the same object in each reader;
        returning them for one reader is enough.
        """
        ...

    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        """Apply the inverse to the canonical gradient [groups, d_out, d_in], or [channels, k] for blocks.

        Small layers of equal shape may be preconditioned together, by `torch.vmap` of this function.
        """
        ...

    def rescale(
        self, directions: list[Tensor], gradients: list[Tensor], *, learning_rates: Tensor
    ) -> list[Tensor]:
        """Bound or restore the length of the update. learning_rates: [layers]."""
        ...

    def factors(self, match: LayerMatch, *, dtype: torch.dtype) -> tuple[FactorSpec, ...]:
        """What is stored per layer and what it costs. The bytes are those that `init` allocates."""
        ...


@runtime_checkable
class DampedMethod(Method, Protocol):
    """A method whose damping lambda has the units of the Hessian of the loss and may be adapted."""

    @property
    def damping(self) -> float:
        """Lambda at the start."""
        ...

    @property
    def quadratic(self) -> QuadraticSettings | None:
        """How the update is taken from the quadratic model; None if it is not."""
        ...

    def damped(self, damping: float) -> Method:
        """The same method with this damping of its preconditioner: lambda + eta, or gamma^2."""
        ...


@runtime_checkable
class RoundingMethod(Method, Protocol):
    """A method that can ask for statistics of rounded rows."""

    @property
    def statistics_precision(self) -> str:
        """Of the rows a and g that statistics are taken of: "full", or rounded to "bfloat16"."""
        ...


def rounds_rows(method: Method) -> bool:
    """Whether its statistics are those of rows rounded to bfloat16."""
    return isinstance(method, RoundingMethod) and method.statistics_precision == "bfloat16"
