"""A program while it is written: what the passes so far have made of loss, gradients and state.

Enters: a `Plan`. Leaves: outputs with names, copies of the graph between passes. The passes themselves are in
`instrument`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import final

import torch
from torch.fx import GraphModule, Node

from kfac_fx.canonical import initial_state
from kfac_fx.planned import Plan
from kfac_fx.types import LayerMatch
from kfac_fx.writer import GraphWriter, Key


@final
class Draft:
    """What one pass leaves to the next.

    gradients: what goes to the optimizer, by parameter. batches: (layer, its statistics, the last node of
    them). batch_state, state: statistics of the batch; new state. raw: gradients that are preconditioned.
    matrices, directions: canonical, per layer. back: nodes from directions to parameters' shapes. products:
    <V, grad> of each layer. read: state tensors that the finished program reads. collects: whether it has
    statistics; only_batch: not averaged. layers: keys of those whose statistics are collected.
    """

    def __init__(
        self,
        plan: Plan,
        sizes: Mapping[Key, Sequence[int]],
        *,
        collects: bool,
        only_batch: bool,
        layers: Collection[str],
    ) -> None:
        self.plan = plan
        self.writer = GraphWriter(plan, sizes)
        self.writer.add_states()
        self.collects, self.only_batch, self.layers = collects, only_batch, frozenset(layers)
        self.check: Node | None = None
        self.weight: Node | None = None
        self.rates: Node | None = None
        self.gradients = {name: self.writer.of(node) for name, node in plan.capture.gradients.items()}
        self.batches: list[tuple[LayerMatch, dict[str, Node], Node]] = []
        self.batch_state: dict[Key, Node] = {}
        self.state: dict[Key, Node] = {}
        self.raw: dict[str, Node] = {}
        self.matrices: list[Node] = []
        self.directions: list[Node] = []
        self.back: tuple[Node, ...] = ()
        self.products: Node | None = None
        self.read: tuple[Key, ...] = ()
        self._finished = False

    def __len__(self) -> int:
        """Number of nodes, without state that nothing reads yet."""
        return len(self.writer.module.graph.nodes) - len(self._unread)

    @property
    def _unread(self) -> frozenset[str]:
        """Names of state inputs that nothing reads yet; the finished program has none."""
        if self._finished:
            return frozenset()
        return frozenset(node.name for node in self.writer.state_nodes() if not node.users)

    @property
    def state_outputs(self) -> dict[Key, Node]:
        """What the finished program returns behind the gradients."""
        return self.batch_state if self.only_batch else self.state

    def outputs(self, *, unfinished: bool = False) -> dict[str, Node]:
        """Outputs by what they are, in order. unfinished: with statistics that are not averaged yet."""
        capture = self.plan.capture
        found = {"loss": self.writer.of(capture.loss)}
        if self.check is not None:
            found |= {
                "1/R_": self.writer.of(capture.inverse_scale),
                "finite if all gradients are": self.check,
            }
        what = "update" if self.directions else "gradient"
        served = {name for match in self.plan.matched for name in (match.weight, match.bias)}
        found |= {
            f"{what if name in served else 'gradient'} of {name}": node
            for name, node in self.gradients.items()
        }
        state = self.state_outputs or (self.batch_state if unfinished else {})
        kind = "new " if state is self.state else "batch "
        found |= {f"{kind}{name} of {key}": node for (key, name), node in state.items()}
        return found if self.products is None else found | {"<V, grad> of each layer": self.products}

    def finish(self) -> None:
        """Set the outputs, drop what nobody reads."""
        outputs = self.outputs()
        self.read = self.writer.finish(list(outputs.values()), collects=self.collects)
        self.writer.module.meta["kfac_fx_outputs"] = tuple(outputs)
        self._finished = True

    def shown(self) -> GraphModule:
        """The graph as it is now, with the outputs that it has so far; it goes on changing."""
        outputs, module = self.outputs(unfinished=True), self.writer.module
        self.writer.end.args = (tuple(outputs.values()),)
        module.meta["kfac_fx_outputs"] = tuple(outputs)
        module.meta["kfac_fx_unread"] = self._unread
        return module

    def distinct(self, direction: Node, match: LayerMatch) -> Node:
        """The direction as a node of its own, if a method returns what it was given."""
        if direction.meta.get("kfac_fx_pass") == "precondition" and direction not in self.matrices:
            return direction
        return self.writer.splice(
            lambda tensor: {"direction": torch.clone(tensor)},
            [direction],
            label=f"preconditioned gradient of {match.name}",
            match=match,
            names={"direction": "direction"},
        )["direction"]

    def rescaled(self, scaled: Mapping[Node, Node]) -> None:
        """Let these nodes stand for the directions, on the way back to the parameters and behind it."""
        for node in self.back:
            for old in node.all_input_nodes:
                node.replace_input_with(old, scaled.get(old, old))
        self.gradients = {name: scaled.get(node, node) for name, node in self.gradients.items()}
        self.directions = [scaled.get(node, node) for node in self.directions]

    def sizes_of(self, match: LayerMatch, names: Sequence[str]) -> str:
        """The statistics with their sizes, where the state has a tensor of that name."""
        state = initial_state(self.plan, match)
        return ", ".join(f"{n} {'x'.join(map(str, state[n].shape))}" if n in state else n for n in names)
