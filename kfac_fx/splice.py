"""Writes torch functions into a graph: traced, copied in front of a node.

Enters: a function of tensors, the nodes that are its arguments. Leaves: the nodes of its results.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from kfac_fx.graph import VIEWS, aten, is_op
from kfac_fx.traces import Trace, traced_once
from kfac_fx.types import Source


def splice(
    module: GraphModule,
    function: Callable[..., Mapping[str, Tensor]],
    arguments: Sequence[Node],
    *,
    before: Node,
    label: str,
    source: Source | None = None,
    key: Hashable = None,
    known: dict[Hashable, Trace] | None = None,
    constants: dict[int, str] | None = None,
    notes: Mapping[str, object] | None = None,
) -> dict[str, Node]:
    """Trace `function` on the fake values of `arguments` and copy its nodes into the graph in front of
    `before`.

    Returns the node of each returned tensor. Every copy carries `label` in `meta["kfac_fx"]`, and `notes`.
    key: equal for functions that compute the same from tensors of equal sizes; such are traced once and kept
    in `known`. A tuple: equal wherever it is met, so that other captures find the trace too. constants: of
    `buffer_names`, to which this adds; looked up here if there is none.
    """
    traced = traced_once(function, arguments, key, {} if known is None else known)
    graph, inner = module.graph, traced.graph
    names = buffer_names(module) if constants is None else constants
    mapping: dict[Node, Any] = dict(zip(inner.find_nodes(op="placeholder"), arguments, strict=True))
    with graph.inserting_before(before):
        for node in inner.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node.op == "get_attr":
                name = _constant(module, traced.constants[str(node.target)], names)
                copy = graph.get_attr(name)
                copy.meta["val"] = node.meta.get("val", getattr(module, name))
            else:
                copy = graph.node_copy(node, lambda n: mapping[n])
                if is_op(copy, *VIEWS):
                    copy.target = aten.reshape.default  # real strides may differ from the traced ones
            mapping[node] = copy
            copy.meta.update(notes or {}, kfac_fx=label, **_trace_of(source))
    outputs = zip(traced.names, inner.output_node().args[0], strict=True)  # type: ignore[arg-type]
    return {name: mapping[node] for name, node in outputs}


def _trace_of(source: Source | None) -> dict[str, str]:
    """A node's note of the user's line, as torch keeps it."""
    if source is None:
        return {}
    return {"stack_trace": f'  File "{source.file}", line {source.line}, in forward\n    {source.code}'}


def buffer_names(module: GraphModule) -> dict[int, str]:
    """Names of the module's buffers by `id`: they live as long as it does."""
    return {id(buffer): name for name, buffer in module.named_buffers()}


def _constant(module: GraphModule, tensor: Tensor, names: dict[int, str]) -> str:
    """The name of the buffer that is this very tensor, made if there is none. names: of all buffers."""
    if id(tensor) not in names:
        names[id(tensor)] = f"_kfac_constant_{len(names)}"
        module.register_buffer(names[id(tensor)], tensor)
    return names[id(tensor)]
