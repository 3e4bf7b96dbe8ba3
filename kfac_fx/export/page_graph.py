"""The neighbourhood of one layer in the rewritten program, small enough to be drawn.

Enters: a plan and its "statistics" program. Leaves: boxes in four lanes and arrows between them. What a
person looks for (weight, a, g, gradients, A, G, direction) has a box of its own; the operations between share
one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import final

from torch.fx import Node

from kfac_fx.canonical import state_owner
from kfac_fx.export.page_boxes import (
    BACKWARD,
    FORWARD,
    PRECONDITION,
    STATISTICS,
    Keys,
    Neighbourhood,
    drawn,
    is_inserted,
    label_of,
)
from kfac_fx.export.page_walk import ancestors, connected, descendants
from kfac_fx.instrument import Program
from kfac_fx.planned import Plan
from kfac_fx.types import LayerMatch

_USES = 2
_NEAR = 60


@final
class Surveyor:
    """Finds neighbourhoods in one program."""

    def __init__(self, plan: Plan, program: Program) -> None:
        self._plan = plan
        nodes = program.module.graph.nodes
        self._nodes = {node.name: node for node in nodes}
        self._order = {node: place for place, node in enumerate(nodes)}
        self._backward = frozenset(node.name for node in nodes if node.meta.get("kfac_fx_backward"))
        returned = program.returned(_returned(program.module.graph.output_node()))
        self._directions = returned.gradients
        self._new_state: dict[str, dict[str, Node]] = {}  # by layer and name
        for (owner, name), node in returned.state.items():
            self._new_state.setdefault(owner, {})[name] = node
        first_state = len(plan.capture.graph.graph.find_nodes(op="placeholder"))
        placeholders = program.module.graph.find_nodes(op="placeholder")
        self._states = frozenset(placeholders[first_state : first_state + len(program.state_inputs)])
        self._factors = self._states.union(returned.state.values())
        self._preconditions = self._splices()

    def around(self, match: LayerMatch) -> Neighbourhood:
        """The neighbourhood of one layer."""
        keys = self._captured_keys(match)
        inside = self._captured_between(match, list(keys))
        statistics = self._statistics(match)
        precondition = self._preconditions.get(match.key, [])
        keys |= self._state_keys(match, statistics, precondition)
        inside |= {n: STATISTICS for n in statistics} | {n: PRECONDITION for n in precondition}
        operations = sorted((node for node in inside if node not in keys), key=self._order.__getitem__)
        between = {node: inside[node] for node in operations}
        return drawn(keys, between, self._backward)

    def _copy(self, captured: Node | None) -> Node | None:
        return None if captured is None else self._nodes.get(captured.name)

    def _lane(self, node: Node) -> int:
        return BACKWARD if node.name in self._backward else FORWARD

    def _captured_keys(self, match: LayerMatch) -> Keys:
        """Nodes with a box of their own, with their title and lane: parameters, a, g and gradients."""
        capture, many = self._plan.capture, len(match.uses) > 1
        found: list[tuple[Node | None, str, int]] = []
        names = [(match.weight, "weight")] + ([(match.bias, "bias")] if match.bias else [])
        for name, what in names:
            found.append((capture.parameter(name).node, what, FORWARD))
        for number, use in enumerate(match.uses[:_USES], start=1):
            which = f" of use {number}" if many else ""
            found.append((use.a, f"a, input{which}", FORWARD))
            found += [(g, _g_title(place) + which, BACKWARD) for place, g in enumerate(use.g)]
            if many:
                found.append((use.grad, f"gradient{which}", BACKWARD))
        found += [(capture.gradients.get(name), f"{what} gradient", BACKWARD) for name, what in names]
        keys: Keys = {}
        for captured, title, lane in found:
            copy = self._copy(captured)
            if copy is not None:
                title = f"{keys[copy][0]} = {title}" if copy in keys else title
                keys[copy] = (title, lane)
        return keys

    def _captured_between(self, match: LayerMatch, keys: Sequence[Node]) -> dict[Node, int]:
        """Captured operations between the keys: the product of the forward, what makes the gradients."""
        found: set[Node] = set()
        weight = self._copy(self._plan.capture.parameter(match.weight).node)
        for use in match.uses[:_USES]:
            found |= self._product(weight, self._copy(use.a)) if weight else set()
        stops = set(keys)
        names = [match.weight, *([match.bias] if match.bias else [])]
        ends = [use.grad for use in match.uses[:_USES]]
        ends += [self._plan.capture.gradients[name] for name in names if name in self._plan.capture.gradients]
        for end in filter(None, map(self._copy, ends)):
            found |= {end} if end not in stops else set()
            found |= ancestors(end, lambda n: n.name in self._backward and n not in stops, limit=_NEAR)
        return {node: self._lane(node) for node in found}

    def _product(self, weight: Node, a: Node | None) -> set[Node]:
        """Forward nodes from weight and `a` up to the first that depends on both, or the weight's readers."""

        def ahead(node: Node) -> bool:
            return node.name not in self._backward and not is_inserted(node) and node.op != "output"

        readers = [user for user in weight.users if ahead(user)]
        of_weight = descendants(weight, ahead, limit=_NEAR)
        of_a = descendants(a, ahead, limit=_NEAR) if a is not None else set()
        meeting = sorted(of_weight & of_a, key=self._order.__getitem__)
        if not meeting:
            return set(readers[:1])
        product = meeting[0]
        return {product} | ancestors(product, lambda n: n in of_weight or n in of_a, limit=_NEAR)

    def _statistics(self, match: LayerMatch) -> list[Node]:
        """Inserted nodes that make the layer's new state, the shared A of another layer included."""
        ends = [
            node for owner, name, node in self._new_of(match) if state_owner(self._plan, match, name) == owner
        ]
        found = {end for end in ends if is_inserted(end)}
        for end in ends:
            found |= ancestors(end, lambda n: _is_fold(n) or _is_factor(n))
        return sorted(found, key=self._order.__getitem__)

    def _new_of(self, match: LayerMatch) -> Iterator[tuple[str, str, Node]]:
        """(layer, name, node) of the new state of the layer that owns its A, and of its own."""
        for owner in dict.fromkeys((match.shared_a, match.key)):
            for name, node in self._new_state.get(owner, {}).items():
                yield owner, name, node

    def _state_keys(
        self, match: LayerMatch, statistics: Sequence[Node], precondition: Sequence[Node]
    ) -> Keys:
        """Stored factors that are read and written, this batch's factors, the direction."""
        keys: Keys = {}
        for lane, nodes in ((STATISTICS, statistics), (PRECONDITION, precondition)):
            for state in self._states_read(nodes):
                name, _, owner = label_of(state).partition(" of ")
                if owner not in (match.key, match.shared_a):  # of another layer of the same stack
                    continue
                shared = f" of {owner}" if owner != match.key else ""
                keys[state] = (f"stored {name}{shared}", lane)
        written = frozenset(statistics)
        for _, name, node in self._new_of(match):
            if node in written:
                keys[node] = (f"new {name}", STATISTICS)
                for batch in ancestors(node, lambda n: _is_fold(n) or _is_factor(n)):
                    if _is_factor(batch) and any(_is_fold(user) for user in batch.users):
                        keys.setdefault(batch, (f"{name} of this batch", STATISTICS))
        for node in statistics:
            keys |= {n: ("share of this batch", STATISTICS) for n in node.all_input_nodes if _is_share(n)}
        inside = frozenset(precondition)
        for node in precondition:
            if any(label_of(user).startswith("inserted, length") for user in node.users):
                curved = self._reads_state(node, inside)
                keys[node] = ("direction" if curved else "gradient as a matrix", PRECONDITION)
        for name in filter(None, (match.weight, match.bias)):
            result = self._directions.get(name)
            if result is not None and precondition:
                which = "weight" if name == match.weight else "bias"
                keys.setdefault(result, (f"{which} direction", PRECONDITION))
        return keys

    def _states_read(self, nodes: Sequence[Node]) -> list[Node]:
        """State tensors that the nodes read."""
        return list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n in self._states))

    def _reads_state(self, node: Node, inside: Collection[Node]) -> bool:
        """Whether the node's value depends on stored or new factors, by way of nodes inside."""
        behind = {node, *ancestors(node, lambda n: n in inside)}
        return any(read in self._factors for other in behind for read in other.all_input_nodes)

    def _splices(self) -> dict[str, list[Node]]:
        """The nodes that precondition each layer, by key. Layers of one name follow in the plan's order."""
        found: dict[str, list[Node]] = {match.key: [] for match in self._plan.matched}
        named: dict[str, list[str]] = {}
        for match in self._plan.matched:
            named.setdefault(match.name, []).append(match.key)
        for name, nodes in self._labelled("preconditioned gradient of ").items():
            layers, parts = named.get(name, []), connected(nodes)
            for place, key in enumerate(layers):
                own = parts[place : place + 1] if len(parts) == len(layers) else parts
                found[key] = [node for part in own for node in part]
        for nodes in self._labelled("preconditioned gradients of ").values():
            stack = frozenset(nodes)
            for node in nodes:
                if "kfac_fx_result_of" in node.meta:
                    own = found[node.meta["kfac_fx_result_of"]]
                    own += [node, *(ancestors(node, stack.__contains__) - set(own))]
        return found

    def _labelled(self, prefix: str) -> dict[str, list[Node]]:
        """Inserted nodes whose label starts so, by the rest of it."""
        found: dict[str, list[Node]] = {}
        for node in self._order:
            label = label_of(node)
            if label.startswith(f"inserted, {prefix}"):
                found.setdefault(label.removeprefix(f"inserted, {prefix}"), []).append(node)
        return found


def _returned(output: Node) -> list[Node]:
    assert isinstance(output.args[0], (tuple, list)), "a program returns a tuple"
    return [node for node in output.args[0] if isinstance(node, Node)]


def _g_title(place: int) -> str:
    return "g, output gradient" if place == 0 else f"g of Fisher pass {place}"


def _is_fold(node: Node) -> bool:
    return label_of(node).startswith("inserted, new state of ")


def _is_factor(node: Node) -> bool:
    return is_inserted(node) and not _is_fold(node) and not _is_share(node)


def _is_share(node: Node) -> bool:
    return label_of(node).startswith("inserted, share of this batch")
