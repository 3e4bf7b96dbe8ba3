"""Moving averages inside products: `keep * old + take * left @ right` in one operator (GEMM's beta, alpha).

A factor that is one product, or the upper half of a symmetric one with its mirror and border, is then not
divided by its count and mixed with the old average in passes of their own. The lower half is the mirror of
the new upper one, as second moments and their averages are symmetric. The shares are numbers that the host
reads as the program runs, so this is for CPUs. Enters: a graph. Leaves: the same, equal to rounding.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch.fx import Graph, Node

from kfac_fx.eager.blocks import Blocks, Slot, blocks_behind, readers
from kfac_fx.eager.placing import compute_into, new_memory, order, read_before, view, without
from kfac_fx.graph import VIEWS, aten, is_op, shape, value

_SCALES = (aten.div.Tensor, aten.mul.Tensor)
_MOVES = (aten.transpose.int, aten.t.default, aten.slice.Tensor, aten.select.int, aten.permute.default)


@final
@dataclass(frozen=True, kw_only=True)
class _Average:
    """One `lerp(old, scaled blocks, weight)`. scales: the operators between, last first."""

    lerp: Node
    scales: tuple[Node, ...]
    blocks: Blocks

    @property
    def old(self) -> Node:
        """The average so far."""
        return self.lerp.args[0]  # type: ignore[return-value]

    @property
    def numbers(self) -> list[Any]:
        """What the shares are computed from: numbers, and nodes of one entry."""
        return [self.lerp.args[2], *(scale.args[1] for scale in self.scales)]


def average_in_products(graph: Graph, is_large: Callable[[Node], bool]) -> None:
    """Of all large averages that consist of products for the most part."""
    for lerp in list(graph.nodes):
        if not (is_op(lerp, aten.lerp.Tensor) and is_large(lerp)):
            continue
        place = order(graph)
        average = _found(lerp, place)
        if average is not None and _is_possible(average, place):
            _write(average, place)


def _found(lerp: Node, place: Mapping[Node, int]) -> _Average | None:
    """What the new part of an average is made of; None where its scales are no numbers."""
    scales, part = [], lerp.args[1]
    while is_op(part, *_SCALES) and _is_number(part.args[1]):  # type: ignore[union-attr]
        scales.append(part)
        part = part.args[0]  # type: ignore[union-attr]
    read = (part, lerp.args[0])
    same_sizes = all(isinstance(node, Node) and shape(node) == shape(lerp) for node in read)
    if not (
        same_sizes
        and value(lerp).dim() >= 2
        and _is_number(lerp.args[2])
        and all(len(scale.users) == 1 for scale in scales)
    ):
        return None
    blocks = blocks_behind(part, lerp, lambda node: read_before(node, lerp, place))  # type: ignore[arg-type]
    return _Average(lerp=lerp, scales=tuple(scales), blocks=blocks)


def _is_number(argument: Any) -> bool:
    return isinstance(argument, (int, float)) or (isinstance(argument, Node) and value(argument).numel() == 1)


def _is_possible(average: _Average, place: Mapping[Node, int]) -> bool:
    """Whether nobody else reads the blocks, the shares are known before them, and products are most of it."""
    blocks, lerp = average.blocks, average.lerp
    if not blocks.computed:
        return False
    own = {*blocks.joins, *blocks.views, *average.scales, lerp}
    for node in (*(node for node, _ in blocks.computed), *blocks.joins):
        if any(reader not in own and not is_op(reader, *_MOVES, *VIEWS) for reader in readers(node)):
            return False
    first = min(place[node] for node, _ in blocks.computed)
    read = [number for number in (*average.numbers, average.old) if isinstance(number, Node)]
    products = sum(math.prod(slot.shape) for node, slot in blocks.computed if is_op(node, aten.mm.default))
    mirrors = [(part, slot) for part, _, slot in blocks.copied if _behind(part) in blocks.met]
    size, dtype = math.prod(shape(lerp)), value(lerp).dtype
    return (
        all(place[node] < first for node in read)
        and 2 * (products + sum(math.prod(slot.shape) for _, slot in mirrors)) >= size
        and all(_is_mirror(part, slot, average) for part, slot in mirrors)
        and all(value(node).dtype == dtype for node in (average.old, *(part for part, _, _ in blocks.copied)))
    )


def _behind(part: Node) -> Node:
    """The node whose memory it is, as far as moves tell."""
    while is_op(part, *_MOVES, *VIEWS, aten.unsqueeze.default):
        part = part.args[0]  # type: ignore[assignment]
    return part


def _is_mirror(part: Node, slot: Slot, average: _Average) -> bool:
    """Whether a block is one that is computed, transposed, at its mirrored place in a symmetric matrix."""
    size = shape(average.lerp)[-1]
    chain = list(_chain(part))
    found = dict(average.blocks.computed).get(chain[-1])
    if found is None or shape(average.lerp)[-2] != size:
        return False
    for node in chain[-2::-1]:
        if not is_op(node, *_MOVES):
            return False
        found = node.target(found, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return found.shape == slot.shape and (
        slot.stride()[-2:] == (size, 1)
        and found.stride() == (*slot.stride()[:-2], 1, size)
        and _entry(slot, size) == _entry(found, size, mirrored=True)
    )


def _chain(part: Node) -> Iterator[Node]:
    yield part
    while is_op(part, *_MOVES):
        part = part.args[0]  # type: ignore[assignment]
        yield part


def _entry(slot: Slot, size: int, *, mirrored: bool = False) -> tuple[int, int, int]:
    """Matrix, row and column of the first entry; of its mirror."""
    matrix, within = divmod(int(slot.storage_offset()), size * size)
    row, column = divmod(within, size)
    return (matrix, column, row) if mirrored else (matrix, row, column)


def shares(weight: Any, scales: Sequence[tuple[bool, Any]], dtype: torch.dtype) -> tuple[float, float]:
    """Of the old average and of the blocks. scales: whether by division, and a number or a tensor of one."""
    take = torch.as_tensor(weight).double()
    for divides, number in scales:
        take = take / number if divides else take * number
    return 1.0 - float(weight), float(take.to(dtype))


def _write(average: _Average, place: Mapping[Node, int]) -> None:
    """Put the average in the place of its blocks."""
    graph, lerp, blocks = average.lerp.graph, average.lerp, average.blocks
    first = min((node for node, _ in blocks.computed), key=place.__getitem__)
    with graph.inserting_before(first):
        scales = tuple((is_op(scale, aten.div.Tensor), scale.args[1]) for scale in average.scales)
        both = graph.call_function(shares, (lerp.args[2], scales, value(lerp).dtype))
        keep, take = (graph.call_function(operator.getitem, (both, number)) for number in range(2))
        old = graph.call_method("contiguous", (average.old,))
    whole = new_memory(lerp, first)
    for node, slot in blocks.computed:
        mine, own = view(whole, slot, before=node), view(old, slot, before=node)
        if is_op(node, aten.mm.default):
            node.target, node.args = aten.addmm.out, (own, *node.args)
            node.kwargs = {"beta": keep, "alpha": take, "out": mine}
            continue
        compute_into(node, mine)
        with graph.inserting_after(node):
            taken = graph.call_function(aten.mul_.Scalar, (mine, take))
        with graph.inserting_after(taken):
            graph.call_function(aten.add_.Tensor, (mine, own), {"alpha": keep})
    for part, join, slot in blocks.copied:
        mine, own = view(whole, slot, before=join), view(old, slot, before=join)
        with graph.inserting_before(join):
            if _behind(part) not in blocks.met:
                part = graph.call_function(aten.mul.Scalar, (part, take))
                part = graph.call_function(aten.add.Tensor, (part, own), {"alpha": keep})
            graph.call_function(aten.copy_.default, (mine, part))
    lerp.replace_all_uses_with(whole)
    for node in (lerp, *average.scales):
        graph.erase_node(node)
    without(blocks, whole, place)
