"""Boxes and arrows of a drawing: named nodes apart, the operations between them together.

Enters: nodes with titles and lanes. Leaves: a `Neighbourhood`. Nothing here knows layers or methods.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

from torch import Tensor
from torch.fx import Node

LANES = ("forward", "backward", "statistics", "precondition")
FORWARD, BACKWARD, STATISTICS, PRECONDITION = range(len(LANES))
Keys: TypeAlias = dict[Node, tuple[str, int]]
Arrow: TypeAlias = tuple[int, int]
_NEAR_PER_SIDE = 2
_LENGTH = "inserted, length of the update"


@final
@dataclass(frozen=True, kw_only=True)
class Box:
    """One box.

    title: what it is. note: name and shape, or the operations. kind: a named node, operations together, or a
    node near the layer. nodes: those it stands for.
    """

    title: str
    note: str
    lane: int
    kind: Literal["key", "ops", "near"]
    nodes: tuple[Node, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Neighbourhood:
    """Boxes, and arrows as pairs of places. `through`: arrows that stand for operations not drawn."""

    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    through: tuple[Arrow, ...]


def drawn(keys: Keys, between: Mapping[Node, int], backward: Collection[str]) -> Neighbourhood:
    """One box per key and one for all operations that lead to the same keys.

    between: lane of each operation, in the graph's order. backward: names of the nodes of the backward.
    """
    boxes = [
        Box(title=title, note=f"{shape_text(node)}{node.name}", lane=lane, kind="key", nodes=(node,))
        for node, (title, lane) in keys.items()
    ]
    place = {node: index for index, node in enumerate(keys)}
    for lane, nodes in _groups(place, between):
        title = "1 operation" if len(nodes) == 1 else f"{len(nodes)} operations"
        place |= dict.fromkeys(nodes, len(boxes))
        boxes.append(Box(title=title, note=_operations(nodes), lane=lane, kind="ops", nodes=nodes))
    arrows = {(place[r], place[node]) for node in place for r in node.all_input_nodes if r in place}
    near, links = _near(place, boxes, backward)
    through = _through([*boxes, *near])
    return Neighbourhood(
        boxes=(*boxes, *near),
        arrows=tuple(sorted(arrow for arrow in arrows | links if arrow[0] != arrow[1])),
        through=tuple(sorted(through - links)),
    )


def is_inserted(node: Node) -> bool:
    """Whether the node was written by a pass of this library."""
    return label_of(node).startswith("inserted, ")


def label_of(node: Node) -> str:
    """What the passes say about the node."""
    return str(node.meta.get("kfac_fx", ""))


def shape_text(node: Node) -> str:
    """`32x64 `; nothing if the value is no tensor."""
    value = node.meta.get("val")
    return f"{'x'.join(map(str, value.shape)) or 'scalar'} " if isinstance(value, Tensor) else ""


def _groups(place: Mapping[Node, int], between: Mapping[Node, int]) -> list[tuple[int, tuple[Node, ...]]]:
    """Operations by lane and by the keys that they lead to without passing another."""
    leads_to: dict[Node, frozenset[int]] = {}
    groups: dict[tuple[int, frozenset[int]], list[Node]] = {}
    for node in reversed(list(between)):
        ends = [frozenset({place[u]}) if u in place else leads_to.get(u, frozenset()) for u in node.users]
        leads_to[node] = frozenset().union(*ends)
        groups.setdefault((between[node], leads_to[node]), []).append(node)
    return [(lane, tuple(reversed(nodes))) for (lane, _), nodes in groups.items()]


def _operations(nodes: Iterable[Node]) -> str:
    """The names of the operations, each once."""
    return ", ".join(dict.fromkeys(map(_operation, nodes)))


def _operation(node: Node) -> str:
    """What made the value: `mm`. One output of several is named by the operation that gives them all."""
    if node.target is operator.getitem and isinstance(node.args[0], Node):
        node = node.args[0]
    text = str(node.target) if node.op == "call_function" else node.op
    return text.split(".")[1] if text.startswith("aten.") else text.rsplit(".", 1)[-1]


def _near(
    place: Mapping[Node, int], boxes: Sequence[Box], backward: Collection[str]
) -> tuple[list[Box], set[Arrow]]:
    """Boxes of nodes next to the layer, a few on each side of each node, and their arrows."""
    near: dict[Hashable, list[Node]] = {}
    links: set[tuple[Hashable, int, bool]] = set()
    for node, index in place.items():
        for others, is_input in ((node.all_input_nodes, True), (node.users, False)):
            outside = [n for n in others if n not in place and _is_near(n, boxes[index].lane, backward)]
            for other in outside[:_NEAR_PER_SIDE]:
                name = label_of(other) if is_inserted(other) else other
                near.setdefault(name, []).append(other)
                links.add((name, index, is_input))
    found = {name: len(boxes) + number for number, name in enumerate(near)}
    arrows = {(found[name], i) if is_input else (i, found[name]) for name, i, is_input in links}
    return [_near_box(tuple(dict.fromkeys(nodes)), backward) for nodes in near.values()], arrows


def _is_near(other: Node, lane: int, backward: Collection[str]) -> bool:
    """Whether a node outside is worth a box: captured and of the same lane, or the length of the update."""
    if lane == PRECONDITION:
        return label_of(other).startswith(_LENGTH)
    captured = not is_inserted(other) and other.op == "call_function"
    return captured and lane == (BACKWARD if other.name in backward else FORWARD)


def _near_box(nodes: tuple[Node, ...], backward: Collection[str]) -> Box:
    """The box of a captured node, or of those that scale the directions of all layers."""
    first = nodes[0]
    if is_inserted(first):
        title, note = label_of(first).removeprefix("inserted, "), "all layers together"
        return Box(title=title, note=note, lane=PRECONDITION, kind="near", nodes=nodes)
    lane = BACKWARD if first.name in backward else FORWARD
    note = f"{shape_text(first)}{first.name}"
    return Box(title=_operation(first), note=note, lane=lane, kind="near", nodes=nodes)


def _through(boxes: Sequence[Box]) -> set[Arrow]:
    """From the length of the update to each direction that a parameter gets."""
    length = [i for i, box in enumerate(boxes) if box.kind == "near" and box.lane == PRECONDITION]
    ends = [i for i, box in enumerate(boxes) if box.title.endswith(" direction")]
    return {(start, end) for start in length for end in ends}
