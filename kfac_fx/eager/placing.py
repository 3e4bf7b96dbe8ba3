"""Blocks of statistics computed where they are joined, instead of elsewhere and copied there.

A factor is joined from blocks: a moment and its border for the bias, lines of products of shifted images, the
upper half of a symmetric product and its mirror. `cat` and `stack` read every block again and write it anew,
which for a large factor costs as much as its products. Enters: a graph. Leaves: the same with fewer joins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from kfac_fx.eager.blocks import COPIES, JOINS, Blocks, Slot, blocks_of, readers
from kfac_fx.graph import aten, is_op, shape, value

INTO: Mapping[Any, Any] = {
    aten.mm.default: aten.mm.out,
    aten.cat.default: aten.cat.out,
    aten.stack.default: aten.stack.out,
}


def place_blocks(graph: Graph, is_large: Callable[[Node], bool]) -> None:
    """Of all large joins, where blocks can be computed in place."""
    gone: set[Node] = set()
    for root in reversed(list(graph.nodes)):  # the outermost join first
        if root in gone or not (is_op(root, *JOINS) and is_large(root)):
            continue
        place = order(graph)
        blocks = blocks_of(root, lambda node, place=place, root=root: read_before(node, root, place))
        if blocks.computed:
            gone |= _place(root, blocks, place)


def order(graph: Graph) -> dict[Node, int]:
    """When each node runs."""
    return {node: number for number, node in enumerate(graph.nodes)}


def read_before(node: Node, last: Node, place: Mapping[Node, int]) -> bool:
    """Whether nobody reads the node's memory after this one has run."""
    return all(place[reader] <= place[last] for reader in readers(node))


def new_memory(like: Node, before: Node) -> Node:
    """Memory for a tensor like that."""
    options = {"dtype": value(like).dtype, "device": value(like).device}
    with like.graph.inserting_before(before):
        memory = like.graph.call_function(aten.empty.memory_format, (list(shape(like)),), options)
    memory.meta = dict(like.meta)
    return memory


def view(whole: Node, slot: Slot, *, before: Node) -> Node:
    """A block of the whole."""
    arguments = (whole, tuple(slot.shape), slot.stride(), slot.storage_offset())
    with whole.graph.inserting_before(before):
        return whole.graph.call_function(block, arguments)


def block(whole: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...], start: int) -> Tensor:
    """A view of a contiguous tensor, which may itself be a part of other memory."""
    return whole.as_strided(sizes, strides, whole.storage_offset() + start)


def compute_into(node: Node, part: Node) -> None:
    """Let the operator write into this part of the whole."""
    if is_op(node, *COPIES):
        node.target, node.args, node.kwargs = aten.copy_.default, (part, node.args[0]), {}
    else:
        node.target, node.kwargs = INTO[node.target], {**node.kwargs, "out": part}


def without(blocks: Blocks, whole: Node, place: Mapping[Node, int]) -> set[Node]:
    """Drop joins and views that nobody reads any more; where a join is read, a view of the whole is now."""
    gone: set[Node] = set()
    for node in sorted({*blocks.views, *blocks.joins}, key=place.__getitem__, reverse=True):
        if node.users and node in blocks.joins:
            instead = view(whole, blocks.joins[node], before=node)
            instead.meta = dict(node.meta)
            node.replace_all_uses_with(instead)
        if not node.users:
            whole.graph.erase_node(node)
            gone.add(node)
    return gone


def _place(root: Node, blocks: Blocks, place: Mapping[Node, int]) -> set[Node]:
    """Give the join memory before its first block is computed. Returns the joins and views that are gone."""
    whole = new_memory(root, min((node for node, _ in blocks.computed), key=place.__getitem__))
    for node, slot in blocks.computed:
        compute_into(node, view(whole, slot, before=node))
    for part, join, slot in blocks.copied:
        copy = view(whole, slot, before=join)
        with root.graph.inserting_before(join):
            root.graph.call_function(aten.copy_.default, (copy, part))
    root.replace_all_uses_with(whole)
    return without(blocks, whole, place)
