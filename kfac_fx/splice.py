"""Writes torch functions into a graph: traced, made small, copied in front of a node.

Enters: a function of tensors, the nodes that are its arguments. Leaves: the nodes of its results.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from kfac_fx import graph as fxgraph
from kfac_fx.graph import aten, is_op
from kfac_fx.types import Source

_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_RESIZES = (*_VIEWS, aten.expand.default)


def splice(
    module: GraphModule,
    function: Callable[..., Mapping[str, Tensor]],
    arguments: Sequence[Node],
    *,
    before: Node,
    label: str,
    source: Source | None = None,
    key: Hashable = None,
    known: dict[Hashable, GraphModule] | None = None,
) -> dict[str, Node]:
    """Trace `function` on the fake values of `arguments` and copy its nodes into the graph in front of
    `before`.

    Returns the node of each returned tensor. Every copy carries `label` in `meta["kfac_fx"]`. key: equal for
    functions that compute the same from tensors of equal sizes; such are traced once and kept in `known`.
    """
    traced = _traced(function, arguments, key, {} if known is None else known)
    graph, inner = module.graph, traced.graph
    mapping: dict[Node, Any] = dict(zip(inner.find_nodes(op="placeholder"), arguments, strict=True))
    with graph.inserting_before(before):
        for node in inner.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node.op == "get_attr":
                name = _constant(module, getattr(traced, str(node.target)))
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
    outputs = zip(traced.meta["names"], inner.output_node().args[0], strict=True)  # type: ignore[arg-type]
    return {name: mapping[node] for name, node in outputs}


def _constant(module: GraphModule, tensor: Tensor) -> str:
    """The name of the buffer that is this very tensor, made if there is none."""
    for name, buffer in module.named_buffers():
        if buffer is tensor:
            return name
    name = f"_kfac_constant_{len(dict(module.named_buffers()))}"
    module.register_buffer(name, tensor)
    return name


def _traced(
    function: Callable[..., Mapping[str, Tensor]],
    arguments: Sequence[Node],
    key: Hashable,
    known: dict[Hashable, GraphModule],
) -> GraphModule:
    """The function's graph, made small; its `meta["names"]` are those of what it returns."""
    values = [fxgraph.value(node) for node in arguments]
    place = (key, *((tuple(v.shape), v.stride(), v.dtype, v.device) for v in values))
    if key is not None and place in known:
        return known[place]
    names: list[str] = []

    def run(*tensors: Tensor) -> list[Tensor]:
        results = function(*tensors)
        names[:] = results
        return list(results.values())

    traced = fxgraph.traced(run, arguments)
    _drop_idle_views(traced)
    traced.meta["names"] = tuple(names)
    if key is not None:
        known[place] = traced
    return traced


def _drop_idle_views(traced: GraphModule) -> None:
    """Of views of views the last alone stays, and none that changes nothing."""
    for node in traced.graph.nodes:
        if not is_op(node, *_RESIZES):
            continue
        read = node.args[0]
        while is_op(node, *_VIEWS) and is_op(read, *_VIEWS):
            read = read.args[0]
        node.update_arg(0, read)
        like, kept = fxgraph.value(read), fxgraph.value(node)
        if like.shape == kept.shape and like.stride() == kept.stride():
            node.replace_all_uses_with(read)
    traced.graph.eliminate_dead_code()
