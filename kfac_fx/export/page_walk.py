"""Which nodes of a graph hang together: what one depends on, what depends on it, groups that no edge joins.

Enters: nodes. Leaves: nodes. Nothing here knows a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.fx import Node


def connected(nodes: Sequence[Node]) -> list[list[Node]]:
    """The nodes in groups that no edge joins, each group in order."""
    group: dict[Node, list[Node]] = {}
    for node in nodes:
        joined = [node]
        for read in node.all_input_nodes:
            if read in group and group[read] is not joined:
                smaller, joined = sorted((group[read], joined), key=len)
                joined.extend(smaller)
                group |= dict.fromkeys(smaller, joined)
        group[node] = joined
    unique = {id(members): members for members in group.values()}
    place = {node: index for index, node in enumerate(nodes)}
    ordered = [sorted(members, key=place.__getitem__) for members in unique.values()]
    return sorted(ordered, key=lambda members: place[members[0]])


def ancestors(node: Node, inside: Callable[[Node], bool], *, limit: int | None = None) -> set[Node]:
    """What the node depends on through nodes inside, nearest first, at most `limit` of them."""
    return _reached(node, lambda n: n.all_input_nodes, inside, limit)


def descendants(node: Node, inside: Callable[[Node], bool], *, limit: int | None = None) -> set[Node]:
    """What depends on the node through nodes inside, nearest first, at most `limit` of them."""
    return _reached(node, lambda n: list(n.users), inside, limit)


def _reached(
    node: Node, step: Callable[[Node], list[Node]], inside: Callable[[Node], bool], limit: int | None
) -> set[Node]:
    found: dict[Node, None] = {}
    queue = [node]
    while queue and (limit is None or len(found) < limit):
        for other in step(queue.pop(0)):
            if other not in found and inside(other):
                found[other] = None
                queue.append(other)
    return set(found)
