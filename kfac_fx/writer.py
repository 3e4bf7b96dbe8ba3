"""A copy of a captured graph that is being written into: placeholders for the state, labels, places.

Enters: a `Plan`. Leaves: an fx graph whose new nodes are named and labelled; `instrument` says what they
compute.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor
from torch.fx import Node

from kfac_fx import editing
from kfac_fx import graph as fxgraph
from kfac_fx.canonical import initial_state, state_owner
from kfac_fx.planned import Plan
from kfac_fx.splice import buffer_names, splice
from kfac_fx.stages import runs
from kfac_fx.traces import Trace, traced_once
from kfac_fx.types import LayerMatch
from kfac_fx.wording import counted

Key = tuple[str, str]


def identifier(name: str) -> str:
    """A name of a parameter or layer as one of Python's."""
    return "".join(c if c.isalnum() else "_" for c in name).strip("_")


def of_layer(match: LayerMatch, what: str) -> str:
    """A name for something of a layer."""
    clean = identifier(match.name)
    return f"layer_{clean}_{what}" if clean[:1].isdigit() else f"{clean}_{what}"


@final
class GraphWriter:
    """The copy of a plan's graph. `module` is the copy; `of` gives the copy of a captured node.

    sizes: shapes of state tensors that are not those of `Method.init`.
    """

    def __init__(self, plan: Plan, sizes: Mapping[Key, Sequence[int]]) -> None:
        self.plan = plan
        self.module, self._copies = editing.copy_module(plan.capture.graph)
        self._constants = buffer_names(self.module)
        self.end = self.module.graph.output_node()
        self._sizes = sizes
        self._order = {node: i for i, node in enumerate(plan.capture.graph.graph.nodes)}
        self._last_placeholder = self.module.graph.find_nodes(op="placeholder")[-1]
        self._states: dict[Key, Node] = {}
        self._stage = ""
        self._kinds: set[Hashable] = set()  # of what this pass wrote
        self._known: dict[Hashable, Trace] = plan.capture.graph.meta.setdefault("kfac_fx_traced", {})
        behind = False
        for captured, copy in self._copies.items():
            behind = behind or captured in plan.capture.backward
            copy.meta["kfac_fx_backward"] = behind

    def of(self, captured: Node) -> Node:
        """The copy of a captured node."""
        return self._copies[captured]

    def placeholder(
        self, name: str, sizes: Sequence[int], label: str, dtype: torch.dtype | None = None
    ) -> Node:
        """A new input of the graph, after those that exist. dtype: that of the loss unless given."""
        scale = fxgraph.value(self.plan.capture.inverse_scale)
        graph = self.module.graph
        with graph.inserting_after(self._last_placeholder):
            node = graph.placeholder(name)
        node._rename(name)
        node.target = node.name
        node.meta["val"] = fxgraph.fake_empty(graph, sizes, dtype=dtype or scale.dtype, device=scale.device)
        node.meta["kfac_fx"] = label
        self._last_placeholder = node
        return node

    def add_states(self) -> None:
        """A placeholder per state tensor."""
        for match in self.plan.matched:
            for name, tensor in initial_state(self.plan, match).items():
                owner = state_owner(self.plan, match, name)
                if (owner, name) in self._states:
                    continue
                sizes = self._sizes.get((owner, name), tensor.shape)
                clean = identifier(f"{owner}_{name}")
                node = self.placeholder(f"s_{clean}", sizes, f"{name} of {owner}", tensor.dtype)
                self._states[owner, name] = node

    def states(self, match: LayerMatch) -> dict[str, Node]:
        """The layer's state by name."""
        names = initial_state(self.plan, match)
        return {name: self._states[state_owner(self.plan, match, name), name] for name in names}

    def begin(self, stage: str) -> None:
        """What is written from now on is written by this pass."""
        self._stage = stage
        self._kinds.clear()

    def state_nodes(self) -> list[Node]:
        """The placeholders of the state."""
        return list(self._states.values())

    def splice(
        self,
        function: Callable[..., Mapping[str, Tensor]],
        arguments: Sequence[Node],
        *,
        label: str,
        names: Mapping[str, str],
        before: Node | None = None,
        match: LayerMatch | None = None,
        key: Hashable = None,
    ) -> dict[str, Node]:
        """Write what a function computes from nodes of the copy; before the end, if not said otherwise.

        names: of the nodes of its results; behind that of the layer `match`, if it is of one. key: equal for
        functions that compute the same; equal layers, and the variants of one capture, are traced once.
        """
        key = key if runs("equal-layers", self.plan.without) else None
        results = splice(
            self.module,
            function,
            arguments,
            before=self.end if before is None else before,
            label=f"inserted, {label}",
            source=None if match is None else match.source,
            key=key,
            known=self._known,
            constants=self._constants,
            notes={"kfac_fx_pass": self._stage, "kfac_fx_layer": "" if match is None else match.name},
        )
        sizes = tuple(fxgraph.value(node).shape for node in arguments)
        self._kinds.add(object() if key is None else (key, sizes))
        new = {node: name for name, node in reversed(results.items()) if node not in arguments}
        for node, name in new.items():
            node._rename(names[name] if match is None else of_layer(match, names[name]))
        return results

    def traced(
        self, function: Callable[..., Mapping[str, Tensor]], arguments: Sequence[Node], key: Hashable
    ) -> Trace:
        """The graph that `splice` would write for these."""
        return traced_once(function, arguments, key, self._known)

    def told(self, num_layers: int) -> str:
        """How many layers a pass has served, and how many of them are like another."""
        alike = num_layers - len(self._kinds)
        return counted(num_layers, "layer") + (f", {alike} of them like another" if alike > 0 else "")

    def after(self, captured: Sequence[Node]) -> Node:
        """The node before which code that reads these captured nodes can stand."""
        last = self.of(max(captured, key=self._order.__getitem__))
        return self.end if last.op == "placeholder" else last.next

    def finish(self, outputs: Sequence[Node], *, collects: bool) -> tuple[Key, ...]:
        """Set the outputs and drop what nobody reads. Returns the state tensors that are read, in order.

        collects: whether the Fisher's passes are kept, and with them what they update in place.
        """
        self.end.args = (tuple(outputs),)
        unused = editing.eliminate_dead(self.module, self._effects(collects), self._states.values())
        self.module.graph.lint()
        return tuple(key for key, node in self._states.items() if node not in unused)

    def _effects(self, collects: bool) -> frozenset[Node]:
        """In-place updates and random draws of the training pass.

        Of the Fisher's passes no draw that nobody reads.
        """
        keep, seen_end = set(), False
        last = max(
            [*self.plan.capture.gradients.values(), self.plan.capture.loss], key=self._order.__getitem__
        )
        for node in self.plan.capture.graph.graph.nodes:
            late = (collects and fxgraph.is_mutation(node)) or fxgraph.assigns_placeholder(node)
            if fxgraph.has_effect(node) and (not seen_end or late):
                keep.add(self.of(node))
            seen_end = seen_end or node is last
        return frozenset(keep)

    def label_matches(self) -> None:
        """Say on each node that was matched what it is."""
        for match in self.plan.matched:
            for use in match.uses:
                for node, label in (
                    (use.a, "input a"),
                    (use.g[0], "output gradient g"),
                    (use.grad, "weight gradient"),
                ):
                    if node is not None:
                        meta = self.of(node).meta
                        text = f"{label} of {match.name}"
                        meta["kfac_fx"] = f"{meta['kfac_fx']}; {text}" if "kfac_fx" in meta else text
