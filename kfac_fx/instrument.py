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
    state_owner,
)
from kfac_fx.contracts import Plan
from kfac_fx.functions import layer_function, reader_nodes, statistics_function, use_nodes
from kfac_fx.types import LayerMatch

Variant = Literal["plain", "statistics", "gradients", "batch_statistics"]
VARIANTS: tuple[Variant, ...] = ("plain", "statistics", "gradients", "batch_statistics")
_Named = Callable[..., Mapping[str, Tensor]]


@final
@dataclass(frozen=True, kw_only=True)
class Program:
    """One variant of the training step.

    module: placeholders are those of the capture, then `state_inputs` in order, then `weights` ([layers],
    share of the new batch in the moving averages) and `learning_rates` ([layers]) where the variant uses
    them. Outputs: loss, 1/R_, a check (finite if all gradients are), gradients in the order of `gradients`,
    then new tensors in the order of `state_outputs`.
    """

    variant: Variant
    module: GraphModule
    state_inputs: tuple[tuple[str, str], ...]
    state_outputs: tuple[tuple[str, str], ...]
    gradients: tuple[str, ...]
    has_weight: bool
    has_rates: bool


def instrument(
    plan: Plan, variant: Variant, *, sizes: Mapping[tuple[str, str], Sequence[int]] | None = None
) -> Program:
    """Write one variant.

    sizes: shapes of state tensors that are not those of `Method.init` (thin factors that have grown).

    plain: forward, backward, precondition. statistics: the same plus the moving averages of the factors.
    gradients: forward and backward alone. batch_statistics: forward, backward and this batch's statistics,
    not yet averaged (for accumulation).
    """
    return _Writer(plan, variant, sizes or {}).write()


@final
class _Writer:
    """Holds the copy of the graph while one variant is written."""

    def __init__(self, plan: Plan, variant: Variant, sizes: Mapping[tuple[str, str], Sequence[int]]) -> None:
        self.plan = plan
        self.sizes = sizes
        self.variant: Variant = variant
        self.module, self.map = fxgraph.copy_module(plan.capture.graph)
        self.graph = self.module.graph
        self.output = self.graph.output_node()
        self.order = {node: i for i, node in enumerate(plan.capture.graph.graph.nodes)}
        self.last_placeholder = self.graph.find_nodes(op="placeholder")[-1]
        self.state_nodes: dict[tuple[str, str], Node] = {}

    def write(self) -> Program:
        """The program of this variant."""
        capture = self.plan.capture
        preconditions = self.variant in ("plain", "statistics")
        averages = self.variant == "statistics"
        collects = self.variant in ("statistics", "batch_statistics")
        self._label_matches()
        if collects or preconditions:
            self._state_placeholders()
        weight = (
            self._placeholder("weights", (len(self.plan.matched),), "share of this batch, per layer")
            if averages
            else None
        )
        gradients = {name: self.map[node] for name, node in capture.gradients.items()}
        check = self._gradient_check(list(gradients.values()))
        new_state = self._statistics(weight) if collects else {}
        rates = None
        if preconditions and self.plan.matched:
            rates = self._placeholder(
                "learning_rates", (len(self.plan.matched),), "learning rate of each layer"
            )
            gradients |= self._precondition(rates, new_state)
        loss, scale = self.map[capture.loss], self.map[capture.inverse_scale]
        self.output.args = ((loss, scale, check, *gradients.values(), *new_state.values()),)
        fxgraph.eliminate_dead(self.module, self._effects())
        inputs = self._used_states()
        self.graph.lint()
        self.module.recompile()
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
            late = (collects and fxgraph.is_mutation(node)) or fxgraph.assigns_placeholder(node)
            if fxgraph.has_effect(node) and (not seen_end or late):
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

    def _state_placeholders(self) -> None:
        """A placeholder per state tensor."""
        for match in self.plan.matched:
            for name, tensor in initial_state(self.plan, match).items():
                owner = state_owner(self.plan, match, name)
                if (owner, name) in self.state_nodes:
                    continue
                clean = "".join(c if c.isalnum() else "_" for c in f"{owner}_{name}")
                sizes = self.sizes.get((owner, name), tensor.shape)
                node = self._placeholder(f"s_{clean}", sizes, f"{name} of {owner}", tensor.dtype)
                self.state_nodes[owner, name] = node

    def _used_states(self) -> list[tuple[str, str]]:
        """The state tensors that the variant reads, in the order of their placeholders; the rest goes."""
        for key, node in list(self.state_nodes.items()):
            if not node.users:
                self.graph.erase_node(node)
                del self.state_nodes[key]
        return list(self.state_nodes)

    def _states(self, match: LayerMatch) -> dict[str, Node]:
        """The layer's state by name."""
        names = initial_state(self.plan, match)
        return {name: self.state_nodes[state_owner(self.plan, match, name), name] for name in names}

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
        """Statistics of every layer beside its weight gradient: what they change in the state.

        Without `weight` those of the batch alone.
        """
        new: dict[tuple[str, str], Node] = {}
        collected: set[tuple[str, str]] = set()
        for index, match in enumerate(self.plan.matched):
            nodes = use_nodes(match)
            read = [*nodes, self.plan.capture.inverse_scale, *reader_nodes(self.plan, match)]
            arguments = [self.map[n] for n in read]
            anchor = self._after(read)
            names = batch_names(self.plan, match)
            wanted = [n for n in names if (state_owner(self.plan, match, n), n) not in collected]
            if not wanted:
                continue
            collected |= {(state_owner(self.plan, match, n), n) for n in wanted}
            extra = [*self._states(match).values(), *([] if weight is None else [weight])]
            function = statistics_function(self.plan, match, wanted, None if weight is None else index)
            label = f"inserted, {', '.join(_named(self.plan, match, wanted))} of {match.name}"
            changed: list[str] = []

            def run(
                *tensors: Tensor, function: _Named = function, names: list[str] = changed
            ) -> list[Tensor]:
                results = function(*tensors)
                names[:] = results
                return list(results.values())

            results = fxgraph.splice(
                self.module, run, [*arguments, *extra], before=anchor, label=label, source=match.source
            )
            owners = [(state_owner(self.plan, match, name), name) for name in changed]
            new.update(zip(owners, results, strict=True))
        return new

    def _gradient_check(self, gradients: list[Node]) -> Node:
        """One number that is finite if and only if all gradients are."""

        def run(*tensors: Tensor) -> list[Tensor]:
            real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
            sums = [t.sum(dtype=torch.promote_types(t.dtype, torch.float32)) for t in real]
            return [torch.stack([total.to(torch.float64) for total in sums]).sum()]

        label = "inserted, finite if all gradients are"
        return fxgraph.splice(self.module, run, gradients, before=self.output, label=label)[0]

    def _after(self, captured: Sequence[Node]) -> Node:
        """The node before which code that reads these nodes of the capture can stand."""
        last = self.map[max(captured, key=self.order.__getitem__)]
        return self.output if last.op == "placeholder" else last.next

    def _precondition(self, rates: Node, changed: Mapping[tuple[str, str], Node]) -> dict[str, Node]:
        """Replace each matched gradient by its preconditioned direction.

        changed: state tensors that the statistics of this step have replaced.

        Layer by layer; then the length of all is bounded or restored, and each goes back to its parameter.
        """
        plan = self.plan
        names = gradient_names(plan)
        read = {name: self.map[plan.capture.gradients[name]] for name in names}
        matrices, directions = [], []
        for match in plan.matched:
            own = {name: read[name] for name in (match.weight, match.bias) if name is not None}
            state = {
                name: changed.get((state_owner(plan, match, name), name), node)
                for name, node in self._states(match).items()
            }
            matrix, direction = fxgraph.splice(
                self.module,
                layer_function(plan, match, list(own), list(state)),
                [*own.values(), *state.values()],
                before=self.output,
                label=f"inserted, preconditioned gradient of {match.name}",
                source=match.source,
            )
            matrices.append(matrix)
            directions.append(direction)

        def rescale(*tensors: Tensor) -> list[Tensor]:
            half = len(tensors) // 2
            return plan.method.rescale(
                list(tensors[:half]), list(tensors[half : 2 * half]), learning_rates=tensors[-1]
            )

        label = f"inserted, length of the update by {plan.method.name}"
        arguments = [*directions, *matrices, rates]
        directions = fxgraph.splice(self.module, rescale, arguments, before=self.output, label=label)

        def back(*tensors: Tensor) -> list[Tensor]:
            gradients = dict(zip(names, tensors, strict=False))
            return list(from_matrices(plan, tensors[len(names) :], gradients).values())

        label = "inserted, back to the parameters' shapes"
        results = fxgraph.splice(
            self.module, back, [*read.values(), *directions], before=self.output, label=label
        )
        return dict(zip(names, results, strict=True))


def _last_training_node(plan: Plan) -> Node:
    order = {node: i for i, node in enumerate(plan.capture.graph.graph.nodes)}
    ends = [*plan.capture.gradients.values(), plan.capture.loss]
    return max(ends, key=order.__getitem__)


def _named(plan: Plan, match: LayerMatch, names: Sequence[str]) -> list[str]:
    """The statistics with their sizes, where the state has a tensor of that name."""
    state = initial_state(plan, match)
    return [f"{n} {'x'.join(map(str, state[n].shape))}" if n in state else n for n in names]
