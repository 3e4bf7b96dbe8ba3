"""Blocks of statistics computed where they are joined, instead of elsewhere and copied there.

A factor is joined from blocks: a moment and its border for the bias, lines of products of shifted images, the
upper half of a symmetric product and its mirror. `cat` and `stack` read every block again and write it anew,
which for a large factor costs as much as its products. torch.compile fuses joins with what follows; this is
for programs that run eagerly. Enters: a program. Leaves: one that computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kfac_fx.editing import copy_module, is_inserted
from kfac_fx.graph import VIEWS, aten, is_op, may_alias, shape, value

_JOINS = (aten.cat.default, aten.stack.default)
_INTO: Mapping[Any, Any] = {
    aten.mm.default: aten.mm.out,
    aten.cat.default: aten.cat.out,
    aten.stack.default: aten.stack.out,
}
Slot: TypeAlias = Tensor  # of the device "meta": sizes, strides and offset in the memory of the whole


@final
@dataclass(frozen=True)
class _Layout:
    """Where the parts of joins go: computed there, or copied; and what is then not needed any more."""

    met: set[Node] = field(default_factory=set)  # what has a place, of all joins of the outermost one
    computed: list[tuple[Node, Slot]] = field(default_factory=list)
    copied: list[tuple[Node, Node, Slot]] = field(default_factory=list)  # a part, the join that reads it
    joins: list[tuple[Node, Slot]] = field(default_factory=list)
    views: list[Node] = field(default_factory=list)


def with_placing(module: GraphModule, *, least_bytes: int) -> GraphModule:
    """The program, in which the blocks of large inserted joins are computed where the joins have them.

    least_bytes: of a join; smaller ones stay as they are, and so does a program without large ones.
    """

    def is_large(node: Node) -> bool:
        return is_op(node, *_JOINS) and is_inserted(node) and value(node).nbytes >= least_bytes

    if not any(map(is_large, module.graph.nodes)):
        return module
    changed, _ = copy_module(module)
    gone: set[Node] = set()
    for node in reversed(list(changed.graph.nodes)):  # the outermost join first
        if node not in gone and is_large(node):
            gone |= _place(node)
    changed.recompile()
    return changed


def _place(root: Node) -> set[Node]:
    """Give the join memory before its first block is computed, if any can be computed there.

    Returns the joins and views that are gone.
    """
    graph, like, place = root.graph, value(root), {node: i for i, node in enumerate(root.graph.nodes)}
    last, layout = place[root], _Layout()
    memory: Slot = torch.empty(like.shape, dtype=like.dtype, device="meta")
    _lay_out(root, memory, layout, lambda node: all(place[user] <= last for user in _readers(node)))
    if not layout.computed:
        return set()
    with graph.inserting_before(min((node for node, _ in layout.computed), key=place.__getitem__)):
        options = {"dtype": like.dtype, "device": like.device}
        whole = graph.call_function(aten.empty.memory_format, (list(like.shape),), options)
        whole.meta = dict(root.meta)
    for node, slot in layout.computed:
        _compute_into(node, _view(whole, slot, before=node))
    for part, join, slot in layout.copied:
        view = _view(whole, slot, before=join)
        with graph.inserting_before(join):
            graph.call_function(aten.copy_.default, (view, part))
    root.replace_all_uses_with(whole)
    gone, slots = set[Node](), dict(layout.joins)
    for node in sorted({*layout.views, *slots}, key=place.__getitem__, reverse=True):
        if node.users and node in slots:
            node.replace_all_uses_with(_view(whole, slots[node], before=node))
        if not node.users:
            graph.erase_node(node)
            gone.add(node)
    return gone


def _lay_out(join: Node, slot: Slot, layout: _Layout, ends: Callable[[Node], bool]) -> bool:
    """Note where the parts of a join go, whose own place is `slot`. False, and nothing noted, if none of them
    can be computed there.

    ends: whether nobody reads a node after the outermost join.
    """
    mine = _Layout(met=layout.met)
    for part, place in _parts(join, slot):
        node, views, own = _producer(part, place)
        may = own is not None and node not in mine.met and is_inserted(node) and ends(node)
        if own is None or not may or not _alike(node, join):
            mine.copied.append((part, join, place))
            continue
        nested = is_op(node, *_JOINS) and _lay_out(node, own, mine, ends)
        if not nested and not _writes_to(node, own):
            mine.copied.append((part, join, place))
            continue
        mine.met.add(node)
        mine.views.extend(views)
        if not nested:
            mine.computed.append((node, own))
    if not mine.computed:
        return False
    layout.computed.extend(mine.computed)
    layout.copied.extend(mine.copied)
    layout.views.extend(mine.views)
    layout.joins.extend([*mine.joins, (join, slot)])
    return True


def _parts(join: Node, slot: Slot) -> Iterator[tuple[Node, Slot]]:
    """Parts of a join, and where each goes."""
    tensors, dim = join.args[0], int(join.args[1]) if len(join.args) > 1 else 0  # type: ignore[arg-type]
    start = 0
    for number, part in enumerate(tensors):  # type: ignore[arg-type,var-annotated]
        if is_op(join, aten.stack.default):
            yield part, slot.select(dim, number)
            continue
        size = shape(part)[dim]
        yield part, slot.narrow(dim, start, size)
        start += size


def _producer(part: Node, slot: Slot) -> tuple[Node, list[Node], Slot | None]:
    """What computes a part, the views between them, and where it would write; None where that is no view."""
    views: list[Node] = []
    while is_op(part, aten.unsqueeze.default, *VIEWS):
        source: Node = part.args[0]  # type: ignore[assignment]
        try:
            unsqueezed = is_op(part, aten.unsqueeze.default)
            slot = slot.select(int(part.args[1]), 0) if unsqueezed else slot.view(shape(source))  # type: ignore[arg-type]
        except RuntimeError:  # these sizes are no view of a part of the whole
            return part, views, None
        views.append(part)
        part = source
    return part, views, slot


def _writes_to(node: Node, slot: Slot) -> bool:
    """Whether the operator writes there as fast as to memory of its own: a product needs whole rows."""
    if is_op(node, aten.mm.default):
        return slot.stride(-1) == 1
    return is_op(node, *_INTO, aten.clone.default)


def _alike(node: Node, join: Node) -> bool:
    return value(node).dtype == value(join).dtype and value(node).device == value(join).device


def _readers(node: Node) -> Iterator[Node]:
    """Who reads the node's memory: its users, and those of its views."""
    for user in node.users:
        yield user
        if may_alias(user):
            yield from _readers(user)


def _compute_into(node: Node, slot: Node) -> None:
    if is_op(node, aten.clone.default):
        node.target, node.args, node.kwargs = aten.copy_.default, (slot, node.args[0]), {}
    else:
        node.target, node.kwargs = _INTO[node.target], {**node.kwargs, "out": slot}


def _view(whole: Node, slot: Slot, *, before: Node) -> Node:
    arguments = (whole, list(slot.shape), list(slot.stride()), slot.storage_offset())
    with whole.graph.inserting_before(before):
        return whole.graph.call_function(aten.as_strided.default, arguments)
