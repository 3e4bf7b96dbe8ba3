"""Elementwise work of statistics in the memory of what it reads, where nobody reads that again.

Enters: a graph. Leaves: the same, computing the same bits in less memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.fx import Graph, Node

from kfac_fx.editing import is_inserted
from kfac_fx.graph import aten, is_op, value

WRITES_INTO: Mapping[Any, Any] = {
    aten.add.Tensor: aten.add.out,
    aten.sub.Tensor: aten.sub.out,
    aten.mul.Tensor: aten.mul.out,
    aten.div.Tensor: aten.div.out,
    aten.lerp.Tensor: aten.lerp.Tensor_out,
    aten.where.self: aten.where.self_out,
}
# What these return is memory of their own.
_FRESH = (
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.cat.default,
    aten.stack.default,
    *WRITES_INTO,
)
# Readers that return nothing of what they read.
_READS = (
    aten.aminmax.default,
    aten.mm.default,
    aten.bmm.default,
    aten.cat.default,
    aten.stack.default,
    *WRITES_INTO,
)


def write_into_operands(graph: Graph, is_large: Callable[[Node], bool]) -> None:
    """Of large elementwise operators that have an operand that ends with them."""
    for node, operand in _reusing(graph, is_large):
        node.target = WRITES_INTO[node.target]
        node.kwargs = {**node.kwargs, "out": operand}


def _reusing(graph: Graph, is_large: Callable[[Node], bool]) -> Iterator[tuple[Node, Node]]:
    """Operators and the operand that each may write into."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if is_op(node, *WRITES_INTO) and is_large(node):
            ending = next(_ending(node, place), None)
            if ending is not None:
                yield node, ending


def _ending(node: Node, place: Mapping[Node, int]) -> Iterator[Node]:
    """Operands of the node's own size that are fresh memory and that it is the last to read."""
    result = value(node)
    for operand in node.all_input_nodes:
        if not (is_inserted(operand) and _is_fresh(operand)):
            continue
        mine = value(operand)
        alike = mine.shape == result.shape and mine.dtype == result.dtype and mine.device == result.device
        if not (alike and mine.is_contiguous() and result.is_contiguous()):
            continue
        others = [user for user in operand.users if user is not node]
        if all(is_op(user, *_READS) and place[user] < place[node] for user in others):
            yield operand


def _is_fresh(node: Node) -> bool:
    """Whether the node owns its memory: also if it writes into an operand that ended with it."""
    return is_op(node, *_FRESH, *WRITES_INTO.values())
