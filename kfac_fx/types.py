"""The frozen records of layers, factors and skips that travel between the passes.

Nodes are named by what they are, never by position. No record is edited after it was made.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor
from torch.fx import Node

from kfac_fx.errors import Reason
from kfac_fx.layout import Geometry, Layout

Fisher = Literal["empirical", "mc", "type2"]
Sharing = Literal["expand", "reduce"]
LossFn: TypeAlias = Callable[[Any, Any], Tensor]
State: TypeAlias = dict[str, Tensor]


@final
@dataclass(frozen=True, kw_only=True)
class Source:
    """A line of the user's program."""

    file: str
    line: int
    code: str

    @property
    def name(self) -> str:
        """The file without its folder, of this system or of Windows."""
        return re.split(r"[\\/]", self.file)[-1]

    def __str__(self) -> str:
        """`file.py:12`, without the folder."""
        return f"{self.name}:{self.line}"


@final
@dataclass(frozen=True, kw_only=True)
class Use:
    """One product of one parameter: `scale * sum_rows g a^T` is a term of its gradient.

    a: the tensor the layer reads (None: a constant one, for shifts). g: cotangent of the layer's output, one
    node per backward pass that reaches this use, the training pass first. absent: places among the layer's
    Fisher passes that do not reach this use but another one: there its g is zero. operands: further
    forward tensors a kind needs (mean and rstd of a norm). bias: whether the layer's bias joins this use.
    """

    a: Node | None
    g: tuple[Node, ...]
    grad: Node
    operands: tuple[Node, ...] = ()
    geometry: Geometry | None = None
    scale: float = 1.0
    bias: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    absent: tuple[int, ...] = ()


@final
@dataclass(frozen=True, kw_only=True)
class LayerMatch:
    """A parameter (and perhaps its bias) whose gradient is a sum of recognised products.

    name: module path. key: name of the weight, or of a part of it, under which the state is kept. structure:
    "kronecker" (factors A and G), "diagonal" (A is a vector) or "block" (small blocks F per channel). part:
    rows of the parameter that this match covers (None: all). d_in counts the bias column. rows: number of
    rows (a, g) per pass, all uses. examples: how many examples those rows come from (the rest are positions).
    state_rows: (rows, examples) of the batch whose sizes laid out the layer's state; None: this one.
    sharing: what the plan decided for the axis that shares the weight.
    """

    name: str
    key: str
    kind: str
    structure: Literal["kronecker", "diagonal", "block"]
    weight: str
    bias: str | None
    part: tuple[int, int] | None
    uses: tuple[Use, ...]
    layout: Layout
    bias_layout: Layout | None
    groups: int
    d_in: int
    d_out: int
    rows: int
    examples: int
    numel: int
    shared_a: str
    source: Source | None
    state_rows: tuple[int, int] | None = None
    sharing: Sharing = "expand"

    @property
    def laid_out(self) -> tuple[int, int]:
        """(rows, examples) that decide the sizes of the state."""
        return self.state_rows or (self.rows, self.examples)

    @property
    def num_passes(self) -> int:
        """Backward passes that feed the layer's Fisher: one, or those from predictions that reach it."""
        return max(len(self.uses[0].g) - 1 + len(self.uses[0].absent), 1)

    @property
    def channels(self) -> int:
        """Input channels of one group of a convolution."""
        return (self.d_in - (self.bias is not None)) // self.kernel_volume

    @property
    def kernel_volume(self) -> int:
        """Positions of a convolution's kernel; 1 for other layers."""
        geometry = self.uses[0].geometry
        return 1 if geometry is None else math.prod(geometry.kernel)

    @property
    def tied(self) -> bool:
        """Whether the weight is also used transposed (embedding and head, tied autoencoder)."""
        return any(use.options.get("swapped", False) for use in self.uses)


@final
@dataclass(frozen=True, kw_only=True)
class Skip:
    """A parameter left to the base optimizer, with the reason."""

    parameter: str
    reason: Reason
    detail: str
    numel: int
    source: Source | None

    @property
    def advice(self) -> str:
        """What the user can do about it."""
        return self.reason.advice


@final
@dataclass(frozen=True, kw_only=True)
class Matches:
    """Every parameter exactly once: matched (as weight or bias) or skipped."""

    matched: tuple[LayerMatch, ...]
    skipped: tuple[Skip, ...]


@final
@dataclass(frozen=True, kw_only=True)
class FactorSpec:
    """One curvature factor of one layer, with everything that is stored for it.

    side: "A", "G", "F", or "S" for what belongs to both sides. dim: side length of the square factor (or
    length of the vector). columns: of a thin factor, else None. count: number of such factors (groups,
    channels). bytes: of its statistics, inverses and all else in the state that no other layer owns. flops_*:
    floating point operations each time that phase runs (one multiply-add counts 2). form: how the statistics
    are computed, in words. shared_with: key of the layer that owns the factor when this layer only reads it.
    """

    owner: str
    side: Literal["A", "G", "F", "S"]
    dim: int
    count: int
    diagonal: bool
    dtype: torch.dtype
    bytes: int
    flops_statistics: int
    flops_refresh: int
    flops_apply: int
    form: str
    shared_with: str | None = None
    columns: int | None = None


@final
@dataclass(frozen=True, kw_only=True)
class Refreshed:
    """Of one refresh.

    How many factors had to be inverted in float64, and how many kept their last inverse; a 0-dim tensor where
    reading the number would wait for the device.
    """

    retried: int | Tensor
    kept_last: int | Tensor


@final
@dataclass(frozen=True, kw_only=True)
class QuadraticSettings:
    """How a method uses the quadratic model of the objective (methods.md 2.6, 2.7).

    momentum: whether the last update is one of the directions. l2: eta of the objective `loss + eta/2
    |theta|^2`. adapt_every: steps between two adaptations of lambda, 0 for never. adapt_factor: w1, what
    lambda is multiplied with or divided by. damping_bounds: least and largest lambda and gamma^2.
    gamma_every: steps between two choices of gamma, 0 for never. gamma_factor: w2^2, of gamma^2.
    """

    momentum: bool
    l2: float
    adapt_every: int
    adapt_factor: float
    damping_bounds: tuple[float, float]
    gamma_every: int
    gamma_factor: float
