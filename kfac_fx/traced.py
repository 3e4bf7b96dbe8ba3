"""A training step as it was traced: one graph, and what each of its nodes is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, final

import torch
from torch.fx import GraphModule, Node

from kfac_fx.types import Fisher, Source


@final
@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter tensor of the model. `aliases` are its other names when modules share it."""

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool
    node: Node

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@final
@dataclass(frozen=True, kw_only=True)
class LossInfo:
    """What the capture found out about the loss (methods.md 1.1).

    kind: "cross_entropy", "mse", "bce", "several" or "unknown". reduction: "mean", "sum", "none", "several"
    or "unknown". examples: N, the batch size. terms: R', the number of loss terms per example; of several
    losses the most. unit: 1/R_ of the loss with reduction "sum", as in `Capture.inverse_scale`. ignores:
    terms can be ignored, and an example has more than one. note: one sentence for the report.
    """

    kind: str
    reduction: str
    examples: int
    terms: int
    unit: float
    ignores: bool
    note: str


@final
@dataclass(frozen=True, kw_only=True)
class LossNodes:
    """One recorded loss in the graph: `R_ sum of weight * ell(prediction)` up to a constant.

    kind, class_dim: see `loss.LossCall`. inverse_scale: 1/R_ of this loss (0-dim). weight: of each term, None
    for all ones.
    """

    kind: Literal["cross_entropy", "mse", "bce"]
    class_dim: int
    prediction: Node
    inverse_scale: Node
    weight: Node | None


@final
@dataclass(frozen=True, kw_only=True)
class Pass:
    """One backward pass: the seeds that start it and the gradient it gives to each parameter, by name.

    losses: positions in `Capture.losses` of the predictions where the seeds start, one each; none for the
    training pass, whose one seed starts at the loss. A parameter that is not in `gradients` has gradient 0.
    """

    seeds: tuple[Node, ...]
    losses: tuple[int, ...]
    gradients: Mapping[str, Node]

    @property
    def seed(self) -> Node:
        """The first seed: the only one of the training pass and of a pass from one prediction."""
        return self.seeds[0]


@final
@dataclass(frozen=True, kw_only=True)
class Capture:
    """A model, its loss and its backward pass as one graph.

    graph: placeholders are parameters, buffers, inputs, targets in that order; outputs are the loss, then one
    gradient per trainable parameter that has one. passes[0] is the training backward; the others, if any,
    start at the predictions that the losses read, for the Fisher. inverse_scale is the node
    of 1/R_ (0-dim tensor): the loss is R_ times the sum of its terms. losses: the recorded losses it is made
    of; none if it has other terms that depend on trainable parameters. backward: nodes that depend on a seed.
    data: nodes that depend on inputs or targets.
    """

    graph: GraphModule
    model_name: str
    parameters: tuple[Parameter, ...]
    buffers: Mapping[str, Node]
    inputs: tuple[Node, ...]
    targets: tuple[Node, ...]
    loss: Node
    loss_info: LossInfo
    inverse_scale: Node
    losses: tuple[LossNodes, ...]
    passes: tuple[Pass, ...]
    backward: frozenset[Node]
    data: frozenset[Node]
    fisher: Fisher
    user_sources: Mapping[str, Source]

    @property
    def gradients(self) -> Mapping[str, Node]:
        """Gradient node of the training loss for each parameter that has one."""
        return self.passes[0].gradients

    def parameter(self, name: str) -> Parameter:
        """The parameter of that name."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> Mapping[str, Parameter]:
        return {parameter.name: parameter for parameter in self.parameters}
