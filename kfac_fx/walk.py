"""Walk from a gradient back through nodes that only rearrange tensors, to the products it is the sum of.

Enters: nodes of a captured graph. Leaves: `Term`s (root, layout steps, scale, rows of the parameter) and
value keys.
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor
from torch.fx import Node

from kfac_fx.graph import aten, is_op, shape, value
from kfac_fx.layout import Permute, View

_SAME = {
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten._to_copy.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
}
_VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.flatten.using_ints,
    aten._reshape_alias.default,
}


@final
@dataclass(frozen=True, kw_only=True)
class Term:
    """One summand of a gradient.

    `root`, then layout steps, times `scale`, written to rows `part` of the parameter.
    """

    root: Node
    steps: tuple[Permute | View, ...] = ()
    scale: float = 1.0
    part: tuple[int, int] | None = None

    def after(self, step: Permute | View) -> Term:
        """The same term, with one more step between the root and the parameter (outermost last)."""
        return replace(self, steps=(step, *self.steps))


def structural_step(node: Node) -> tuple[Node, Permute | View | None] | None:
    """(input, layout step) of a node that only rearranges one tensor; None for anything else."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    source = node.args[0]
    if node.target in _SAME:
        return source, None
    if not isinstance(source.meta.get("val"), Tensor):
        return None
    before = shape(source)
    if node.target in _VIEWS or _is_trivial_sum(node, before):
        after = shape(node)
        if math.prod(before) != math.prod(after):
            return None
        return source, None if before == after else View(before=before, after=after)
    if node.target is aten.t.default:
        return source, Permute(dims=(1, 0)) if len(before) == 2 else None
    if node.target is aten.transpose.int:
        dims = list(range(len(before)))
        first, second = (int(d) % len(before) for d in node.args[1:3])  # type: ignore[arg-type]
        dims[first], dims[second] = dims[second], dims[first]
        return source, Permute(dims=tuple(dims))
    if node.target is aten.permute.default:
        return source, Permute(dims=tuple(int(d) % len(before) for d in node.args[1]))  # type: ignore[union-attr,arg-type]
    return None


def _is_trivial_sum(node: Node, before: tuple[int, ...]) -> bool:
    if node.target is not aten.sum.dim_IntList:
        return False
    return all(before[int(d)] == 1 for d in node.args[1])  # type: ignore[union-attr,arg-type]


def _constant_factor(node: Node) -> tuple[Node, float] | None:
    if is_op(node, aten.neg.default):
        return node.args[0], -1.0  # type: ignore[return-value]
    if is_op(node, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        left, right = node.args[:2]
        inverse = node.target in (aten.div.Tensor, aten.div.Scalar)
        if isinstance(left, Node) and isinstance(right, (int, float)):
            return left, 1.0 / right if inverse else float(right)
    return None


def gradient_terms(gradient: Node, *, stop: Container[object] = ()) -> list[Term]:
    """Walk back from a parameter's gradient through structural nodes to the products it is the sum of."""
    finished: list[Term] = []
    queue = [Term(root=gradient)]
    while queue:
        term = queue.pop()
        parts = None if term.root in stop else _expand_term(term)
        if parts is None:
            finished.append(term)
        else:
            queue.extend(reversed(parts))
    return finished


def _expand_term(term: Term) -> list[Term] | None:
    node = term.root
    moved = structural_step(node)
    if moved is not None:
        source, step = moved
        inner = replace(term, root=source)
        return [inner if step is None else inner.after(step)]
    scaled = _constant_factor(node)
    if scaled is not None:
        return [replace(term, root=scaled[0], scale=term.scale * scaled[1])]
    if is_op(node, aten.add.Tensor) and not node.kwargs:
        left, right = node.args[:2]
        if isinstance(left, Node) and isinstance(right, Node) and shape(left) == shape(right) == shape(node):
            return [replace(term, root=left), replace(term, root=right)]
    return _expand_part(term)


def _expand_part(term: Term) -> list[Term] | None:
    """A gradient written to some rows of the parameter only (chunks of a packed weight, experts in one
    tensor).
    """
    node = term.root
    if term.part is not None or term.steps:
        return None
    if is_op(node, aten.slice_backward.default):
        grad, sizes, dim, start, end, step = node.args
        if dim == 0 and step == 1:
            stop = min(int(end), int(sizes[0]))  # type: ignore[index,arg-type]
            return [replace(term, root=grad, part=(int(start), stop))]  # type: ignore[arg-type]
    if is_op(node, aten.select_backward.default):
        grad, _, dim, index = node.args
        if dim == 0:
            inner = shape(grad)  # type: ignore[arg-type]
            begin = int(index) % shape(node)[0]  # type: ignore[arg-type]
            new = replace(term, root=grad, part=(begin, begin + 1))  # type: ignore[arg-type]
            return [new.after(View(before=inner, after=(1, *inner)))]
    if is_op(node, aten.cat.default) and (len(node.args) < 2 or node.args[1] == 0):
        begin, parts = 0, []
        for piece in node.args[0]:  # type: ignore[union-attr]
            rows = shape(piece)[0]  # type: ignore[arg-type]
            parts.append(replace(term, root=piece, part=(begin, begin + rows)))  # type: ignore[arg-type]
            begin += rows
        return parts
    return None


def base_value(node: Node) -> tuple[Node, tuple[object, ...]]:
    """The tensor behind views, and the steps from it: two nodes with equal results hold the same numbers."""
    steps: list[object] = []
    while True:
        moved = structural_step(node)
        if moved is None:
            return node, tuple(reversed(steps))
        source, step = moved
        if step is not None:
            steps.append(step)
        elif value(node).dtype != value(source).dtype:
            steps.append(value(node).dtype)
        node = source


def base(node: Node) -> Node:
    """The node behind views, copies and casts."""
    return base_value(node)[0]
