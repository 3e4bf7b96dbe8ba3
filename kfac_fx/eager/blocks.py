"""Where the blocks of a join can be computed: at once in the memory of the whole.

Enters: the nodes of a graph. Leaves: a layout; nothing is changed here. A slot is a tensor of the device
"meta" whose sizes, strides and offset say where in the whole a block stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias, final

import torch
from torch import Tensor
from torch.fx import Node

from kfac_fx.editing import is_inserted
from kfac_fx.graph import VIEWS, aten, is_op, may_alias, shape, value

JOINS = (aten.cat.default, aten.stack.default)
COPIES = (aten.clone.default,)
Slot: TypeAlias = Tensor
Ends: TypeAlias = Callable[[Node], bool]  # whether nobody reads a node once the whole is there


@final
@dataclass(frozen=True)
class Blocks:
    """Where the parts of joins go: computed there, or copied; and what is then not needed any more."""

    met: set[Node] = field(default_factory=set)  # what has a place
    computed: list[tuple[Node, Slot]] = field(default_factory=list)
    copied: list[tuple[Node, Node, Slot]] = field(default_factory=list)  # a part, the join that reads it
    joins: dict[Node, Slot] = field(default_factory=dict)
    views: list[Node] = field(default_factory=list)


def memory_like(node: Node) -> Slot:
    """The whole."""
    return torch.empty(shape(node), dtype=value(node).dtype, device="meta")


def blocks_of(join: Node, ends: Ends) -> Blocks:
    """Of a join. Nothing is `computed` where nothing can be."""
    found = Blocks()
    _lay_out(join, memory_like(join), found, ends)
    return found


def blocks_behind(part: Node, whole: Node, ends: Ends) -> Blocks:
    """Of what a tensor of the whole's size is made of: a join or a product, seen through views."""
    found = Blocks()
    _find_place(part, memory_like(whole), whole, found, ends)
    return found


def readers(node: Node) -> Iterator[Node]:
    """Who reads the node's memory: its users, and those of its views."""
    for user in node.users:
        yield user
        if may_alias(user):
            yield from readers(user)


def _lay_out(join: Node, slot: Slot, blocks: Blocks, ends: Ends) -> bool:
    """Note where the parts of a join go. False, and nothing noted, if none of them can be computed there."""
    mine = Blocks(met=blocks.met)
    for part, own in _parts(join, slot):
        if value(part).dim() != own.dim():  # cat leaves out empty vectors, whatever the others are
            return False
        if not _find_place(part, own, join, mine, ends):
            mine.copied.append((part, join, own))
    if not mine.computed:
        return False
    blocks.computed.extend(mine.computed)
    blocks.copied.extend(mine.copied)
    blocks.views.extend(mine.views)
    blocks.joins.update(mine.joins)
    blocks.joins[join] = slot
    return True


def _find_place(part: Node, slot: Slot, whole: Node, blocks: Blocks, ends: Ends) -> bool:
    """Note that a part is computed in this slot, if it can be."""
    node, views, own = _producer(part, slot)
    if own is None or node in blocks.met or not (is_inserted(node) and ends(node)):
        return False
    if value(node).dtype != value(whole).dtype or value(node).device != value(whole).device:
        return False
    nested = is_op(node, *JOINS) and _lay_out(node, own, blocks, ends)
    if not nested and not _writes_to(node, own):
        return False
    blocks.met.add(node)
    blocks.views.extend(views)
    if not nested:
        blocks.computed.append((node, own))
    return True


def _parts(join: Node, slot: Slot) -> Iterator[tuple[Node, Slot]]:
    """Parts of a join, and where each goes."""
    tensors, dim = join.args[0], int(join.args[1]) if len(join.args) > 1 else 0  # type: ignore[arg-type]
    start = 0
    for number, part in enumerate(tensors):  # type: ignore[arg-type,var-annotated]
        if is_op(join, aten.stack.default):
            yield part, slot.select(dim, number)
            continue
        size = shape(part)[dim] if value(part).dim() == slot.dim() else 0
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
    return is_op(node, *JOINS, *COPIES)
