"""Read fx nodes and splice torch functions into a graph.

Enters: graphs made by `capture`. Leaves: facts about nodes (what produced a gradient, forward or backward,
source line) and new nodes traced from ordinary torch functions. Nothing here knows a layer kind or a method.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from kfac_fx.types import Permute, Source, View

aten = torch.ops.aten

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
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)')
_TORCH_ROOT = os.path.dirname(torch.__file__) + os.sep
_OWN_ROOT = os.path.dirname(__file__) + os.sep


def is_op(node: object, *targets: object) -> bool:
    """Whether `node` is a call of one of these operators."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def value(node: Node) -> Tensor:
    """The fake tensor that stands for the node's value."""
    found = node.meta["val"]
    assert isinstance(found, Tensor), f"{node} has no tensor value"
    return found


def shape(node: Node) -> tuple[int, ...]:
    """Static shape of the node's value."""
    return tuple(int(size) for size in value(node).shape)


def descendants(seeds: Iterable[Node]) -> frozenset[Node]:
    """The seeds and every node that depends on one of them."""
    found: set[Node] = set(seeds)
    queue = list(found)
    while queue:
        for user in queue.pop().users:
            if user not in found:
                found.add(user)
                queue.append(user)
    return frozenset(found)


def getitem_source(node: Node) -> tuple[Node, int] | None:
    """(producer, index) if the node selects one output of a multi-output operator."""
    if node.op == "call_function" and node.target is operator.getitem:
        return node.args[0], int(node.args[1])  # type: ignore[return-value,arg-type]
    return None


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


def gradient_terms(gradient: Node) -> list[Term]:
    """Walk back from a parameter's gradient through structural nodes to the products it is the sum of."""
    finished: list[Term] = []
    queue = [Term(root=gradient)]
    while queue:
        term = queue.pop()
        parts = _expand_term(term)
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
    """A gradient written to some rows of the parameter only (chunks of a packed weight, experts in one tensor)."""
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


def user_source(stack_trace: str | None) -> Source | None:
    """The innermost line of the user's own program in a node's stack trace."""
    frames = _FRAME.findall(stack_trace or "")
    own = [f for f in frames if not f[0].startswith((_TORCH_ROOT, _OWN_ROOT)) and os.path.isabs(f[0])]
    if not own:
        return None
    file, line, code = own[-1]
    return Source(file=file, line=int(line), code=code.strip())


def fake_mode(graph: Graph) -> FakeTensorMode:
    """The fake tensor mode under which the graph's example values live."""
    mode = detect_fake_mode([n.meta["val"] for n in graph.nodes if isinstance(n.meta.get("val"), Tensor)])
    assert mode is not None, "the graph carries no fake values"
    return mode


def fake_empty(graph: Graph, sizes: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A fake tensor for a new placeholder of the graph."""
    with fake_mode(graph):
        return torch.empty(tuple(sizes), dtype=dtype, device=device)


def splice(
    module: GraphModule,
    function: Callable[..., Sequence[Tensor]],
    arguments: Sequence[Node],
    *,
    before: Node,
    label: str,
    source: Source | None = None,
) -> list[Node]:
    """Trace `function` on the fake values of `arguments` and copy its nodes into the graph in front of
    `before`.

    Returns one node per returned tensor. Every copy carries `label` in `meta["kfac_fx"]`.
    """
    graph = module.graph
    values = [value(node) for node in arguments]
    with fake_mode(graph):
        traced = make_fx(lambda *tensors: tuple(function(*tensors)))(*values)
    inner = traced.graph
    inner.eliminate_dead_code()
    assert not any(is_mutation(node) for node in inner.nodes), "spliced functions must not work in place"
    mapping: dict[Node, Any] = dict(zip(inner.find_nodes(op="placeholder"), arguments, strict=True))
    with graph.inserting_before(before):
        for node in inner.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node.op == "get_attr":
                name = f"_kfac_constant_{sum(1 for _ in module.buffers())}"
                module.register_buffer(name, getattr(traced, str(node.target)))
                copy = graph.get_attr(name)
                copy.meta["val"] = node.meta.get("val", getattr(module, name))
            else:
                copy = graph.node_copy(node, lambda n: mapping[n])
            mapping[node] = copy
            copy.meta["kfac_fx"] = label
            if source is not None:
                copy.meta["stack_trace"] = (
                    f'  File "{source.file}", line {source.line}, in forward\n    {source.code}'
                )
    outputs = inner.output_node().args[0]
    return [mapping[node] for node in outputs]  # type: ignore[union-attr,index]


def copy_module(module: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """A copy whose graph can be edited, and the map from old nodes to new ones."""
    graph = Graph()
    mapping: dict[Node, Node] = {}
    output = graph.graph_copy(module.graph, mapping)
    graph.output(output)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    return GraphModule(module, graph, class_name=type(module).__name__), mapping


def eliminate_dead(module: GraphModule, keep: frozenset[Node]) -> None:
    """Remove nodes that no output needs; `keep` are nodes with effects (in-place updates, random draws)."""
    module.graph.eliminate_dead_code(is_impure_node=lambda n: n in keep or n.op in ("placeholder", "output"))
    for node in module.graph.nodes:
        if is_op(node, aten.convolution_backward.default):
            used = {int(user.args[1]) for user in node.users}  # type: ignore[arg-type]
            mask = [bool(m) and i in used for i, m in enumerate(node.args[-1])]  # type: ignore[arg-type]
            if any(mask):
                node.args = (*node.args[:-1], mask)
    module.recompile()


def has_effect(node: Node) -> bool:
    """Whether running the node changes a tensor in place or draws random numbers."""
    return is_random(node) or is_mutation(node)


def is_mutation(node: Node) -> bool:
    """Whether running the node changes one of its arguments in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_random(node: Node) -> bool:
    """Whether running the node draws random numbers."""
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
    )
