"""Writes a plan into the captured graph.

Enters: a `Plan`. Leaves: `Program`s, one fx graph per variant, whose mathematics is ordinary torch functions
traced and spliced beside the weight gradients they belong to. Loss and gradients stay the nodes that were
captured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kfac_fx import graph as fxgraph
from kfac_fx.canonical import (
    batch_names,
    from_matrices,
    gradient_names,
    initial_state,
    state_dtype,
    state_owner,
    to_matrix,
)
from kfac_fx.contracts import Plan
from kfac_fx.layers import KINDS
from kfac_fx.layers.statistics import MatchStatistics, UseValues
from kfac_fx.types import LayerMatch, State, Use

Variant = Literal["plain", "statistics", "gradients", "batch_statistics"]
VARIANTS: tuple[Variant, ...] = ("plain", "statistics", "gradients", "batch_statistics")
KINDS_BY_NAME = {kind.name: kind for kind in KINDS}


@final
@dataclass(frozen=True, kw_only=True)
class Program:
    """One variant of the training step.

    module: placeholders are those of the capture, then `state_inputs` in order, then `weight` (0-dim, share
    of the new batch in the moving averages) and `learning_rates` ([layers]) where the variant uses them.
    Outputs: loss, 1/R_, gradients in the order of `gradients`, then new tensors in the order of
    `state_outputs`.
    """

    variant: Variant
    module: GraphModule
    state_inputs: tuple[tuple[str, str], ...]
    state_outputs: tuple[tuple[str, str], ...]
    gradients: tuple[str, ...]
    has_weight: bool
    has_rates: bool


def instrument(plan: Plan, variant: Variant) -> Program:
    """Write one variant.

    plain: forward, backward, precondition. statistics: the same plus the moving averages of the factors.
    gradients: forward and backward alone. batch_statistics: forward, backward and this batch's statistics,
    not yet averaged (for accumulation).
    """
    return _Writer(plan, variant).write()


@final
class _Writer:
    """Holds the copy of the graph while one variant is written."""

    def __init__(self, plan: Plan, variant: Variant) -> None:
        self.plan = plan
        self.variant: Variant = variant
        self.module, self.map = fxgraph.copy_module(plan.capture.graph)
        self.graph = self.module.graph
        self.output = self.graph.output_node()
        self.last_placeholder = self.graph.find_nodes(op="placeholder")[-1]
        self.state_nodes: dict[tuple[str, str], Node] = {}

    def write(self) -> Program:
        """The program of this variant."""
        capture = self.plan.capture
        preconditions = self.variant in ("plain", "statistics")
        averages = self.variant == "statistics"
        collects = self.variant in ("statistics", "batch_statistics")
        self._label_matches()
        inputs = self._state_placeholders(averages, preconditions)
        weight = (
            self._placeholder("weight", (), "share of this batch in the moving averages")
            if averages
            else None
        )
        gradients = {name: self.map[node] for name, node in capture.gradients.items()}
        new_state = self._statistics(weight) if collects else {}
        rates = None
        if preconditions and self.plan.matched:
            rates = self._placeholder(
                "learning_rates", (len(self.plan.matched),), "learning rate of each layer"
            )
            gradients |= self._precondition(rates)
        loss, scale = self.map[capture.loss], self.map[capture.inverse_scale]
        self.output.args = ((loss, scale, *gradients.values(), *new_state.values()),)
        fxgraph.eliminate_dead(self.module, self._effects())
        self.graph.lint()
        return Program(
            variant=self.variant,
            module=self.module,
            state_inputs=tuple(inputs),
            state_outputs=tuple(new_state),
            gradients=tuple(gradients),
            has_weight=weight is not None,
            has_rates=rates is not None,
        )

    def _effects(self) -> frozenset[Node]:
        """In-place updates and random draws of the training pass.

        Of the Fisher's passes no draw that nobody reads.
        """
        keep, seen_end = set(), False
        last = _last_training_node(self.plan)
        collects = self.variant in ("statistics", "batch_statistics")
        for node in self.plan.capture.graph.graph.nodes:
            if fxgraph.has_effect(node) and (not seen_end or (collects and fxgraph.is_mutation(node))):
                keep.add(self.map[node])
            seen_end = seen_end or node is last
        return frozenset(keep)

    def _placeholder(
        self, name: str, sizes: Sequence[int], label: str, dtype: torch.dtype | None = None
    ) -> Node:
        scale = fxgraph.value(self.plan.capture.inverse_scale)
        with self.graph.inserting_after(self.last_placeholder):
            node = self.graph.placeholder(name)
        node._rename(name)
        node.target = node.name
        node.meta["val"] = fxgraph.fake_empty(
            self.graph, sizes, dtype=dtype or scale.dtype, device=scale.device
        )
        node.meta["kfac_fx"] = label
        self.last_placeholder = node
        return node

    def _state_placeholders(self, averages: bool, preconditions: bool) -> list[tuple[str, str]]:
        """A placeholder per state tensor that the variant reads."""
        method, created = self.plan.method, []
        if not (averages or preconditions):
            return created
        for match in self.plan.matched:
            for name, tensor in initial_state(self.plan, match, method).items():
                owner = state_owner(self.plan, match, name)
                if (owner, name) in self.state_nodes:
                    continue
                clean = "".join(c if c.isalnum() else "_" for c in f"{owner}_{name}")
                node = self._placeholder(f"s_{clean}", tensor.shape, f"{name} of {owner}", tensor.dtype)
                self.state_nodes[owner, name] = node
                created.append((owner, name))
        return created

    def _label_matches(self) -> None:
        for match in self.plan.matched:
            for use in match.uses:
                for node, label in (
                    (use.a, "input a"),
                    (use.g[0], "output gradient g"),
                    (use.grad, "weight gradient"),
                ):
                    if node is not None:
                        meta = self.map[node].meta
                        text = f"{label} of {match.name}"
                        meta["kfac_fx"] = f"{meta['kfac_fx']}; {text}" if "kfac_fx" in meta else text

    def _statistics(self, weight: Node | None) -> dict[tuple[str, str], Node]:
        """Batch statistics of every layer beside its weight gradient; with `weight` folded into the state."""
        new: dict[tuple[str, str], Node] = {}
        for match in self.plan.matched:
            nodes = _use_nodes(match)
            anchor = self._after([self.map[n] for n in nodes] + [self.map[self.plan.capture.inverse_scale]])
            arguments = [self.map[n] for n in nodes] + [self.map[self.plan.capture.inverse_scale]]
            names = batch_names(self.plan, match)
            wanted = [name for name in names if (state_owner(self.plan, match, name), name) not in new]
            states = (
                []
                if weight is None
                else [self.state_nodes[state_owner(self.plan, match, n), n] for n in wanted]
            )
            extra = [] if weight is None else [*states, weight]
            function = _statistics_function(self.plan, match, wanted, weight is not None)
            sizes = ", ".join(f"{n} {_size(self.plan, match, n)}" for n in wanted)
            label = f"inserted, {sizes} of {match.name}"
            results = fxgraph.splice(
                self.module, function, [*arguments, *extra], before=anchor, label=label, source=match.source
            )
            for name, node in zip(wanted, results, strict=True):
                new[state_owner(self.plan, match, name), name] = node
        return new

    def _after(self, nodes: Sequence[Node]) -> Node:
        """The node before which code that reads `nodes` can stand."""
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        last = max(nodes, key=order.__getitem__)
        return self.output if last.op == "placeholder" else last.next

    def _precondition(self, rates: Node) -> dict[str, Node]:
        """Replace each matched gradient by its preconditioned direction, then bound or restore the length of
        all.
        """
        plan, new = self.plan, {}
        capture = plan.capture
        names = gradient_names(plan)
        read = [self.map[capture.gradients[name]] for name in names]
        keys = list(self.state_nodes)
        function = precondition_function(plan, keys)
        label = f"inserted, preconditioned by {plan.method.name}"
        results = fxgraph.splice(
            self.module, function, [*read, *self.state_nodes.values(), rates], before=self.output, label=label
        )
        for name, node in zip(names, results, strict=True):
            new[name] = node
        return new


def _last_training_node(plan: Plan) -> Node:
    order = {node: i for i, node in enumerate(plan.capture.graph.graph.nodes)}
    ends = [*plan.capture.gradients.values(), plan.capture.loss]
    return max(ends, key=order.__getitem__)


def _size(plan: Plan, match: LayerMatch, name: str) -> str:
    return "x".join(str(s) for s in initial_state(plan, match, plan.method)[name].shape)


def _use_nodes(match: LayerMatch) -> list[Node]:
    """Nodes that the statistics of a match read, in the order of `_use_values`."""
    nodes: list[Node] = []
    for use in match.uses:
        nodes += [*([] if use.a is None else [use.a]), *use.operands, *fisher_gradients(use)]
    return nodes


def fisher_gradients(use: Use) -> tuple[Node, ...]:
    """G of the passes that feed the Fisher: the later ones if there are any, else the training pass."""
    return use.g[1:] or use.g


def use_values(
    match: LayerMatch, tensors: Sequence[Tensor], *, training: bool = False
) -> tuple[UseValues, ...]:
    """Give each use the values of its nodes. training: `g` of the training pass alone."""
    source, values = iter(tensors), []
    for use in match.uses:
        a = None if use.a is None else next(source)
        operands = tuple(next(source) for _ in use.operands)
        count = 1 if training else len(fisher_gradients(use))
        g = tuple(next(source) for _ in range(count))
        values.append(UseValues(use=use, a=a, operands=operands, g=g))
    return tuple(values)


def _statistics_function(
    plan: Plan, match: LayerMatch, wanted: list[str], averaged: bool
) -> Callable[..., Sequence[Tensor]]:
    num_nodes = len(_use_nodes(match))

    def run(*tensors: Tensor) -> Sequence[Tensor]:
        statistics = MatchStatistics(
            match=match,
            uses=use_values(match, tensors[:num_nodes]),
            kinds=KINDS_BY_NAME,
            inverse_scale=tensors[num_nodes],
            sharing=plan.sharing,
        )
        dtype = state_dtype(plan, match)
        batch = plan.method.batch_statistics(statistics, wanted)
        batch = {name: value.to(dtype) for name, value in batch.items()}
        if averaged:
            state = dict(zip(wanted, tensors[num_nodes + 1 : -1], strict=True))
            batch = plan.method.moving_average(state, batch, weight=tensors[-1])
        return [batch[name] for name in wanted]

    return run


def precondition_function(plan: Plan, keys: Sequence[tuple[str, str]]) -> Callable[..., list[Tensor]]:
    """(gradients of `gradient_names`, state tensors of `keys`, learning rates) -> preconditioned
    gradients.
    """
    names = gradient_names(plan)

    def run(*tensors: Tensor) -> list[Tensor]:
        gradients = dict(zip(names, tensors[: len(names)], strict=True))
        flat = dict(zip(keys, tensors[len(names) : -1], strict=True))
        matrices = [to_matrix(match, gradients) for match in plan.matched]
        directions = [
            plan.method.precondition(_layer_state(plan, match, flat), matrix)
            for match, matrix in zip(plan.matched, matrices, strict=True)
        ]
        directions = plan.method.rescale(directions, matrices, learning_rates=tensors[-1])
        return list(from_matrices(plan, directions, gradients).values())

    return run


def _layer_state(plan: Plan, match: LayerMatch, flat: Mapping[tuple[str, str], Tensor]) -> State:
    names = initial_state(plan, match, plan.method)
    return {name: flat[state_owner(plan, match, name), name] for name in names}
