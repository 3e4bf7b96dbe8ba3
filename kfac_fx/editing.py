"""Copies of graphs that can be edited, and what is dropped from them at the end.

Enters: graphs. Leaves: copies with maps from old nodes to new ones; smaller graphs. Nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Graph, GraphModule, Node

from kfac_fx.graph import VIEWS, aten, is_mutation, is_op


def copy_graph(graph: Graph) -> tuple[Graph, dict[Node, Node]]:
    """A copy that can be edited, and the map from old nodes to new ones."""
    copy = Graph()
    mapping: dict[Node, Node] = {}
    copy.output(copy.graph_copy(graph, mapping))
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    return copy, mapping


def copy_module(module: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """The same for a module."""
    graph, mapping = copy_graph(module.graph)
    return GraphModule(module, graph, class_name=type(module).__name__), mapping


def is_inserted(node: Node) -> bool:
    """Whether a pass wrote the node; the others are the user's program."""
    return str(node.meta.get("kfac_fx", "")).startswith("inserted")


def eliminate_dead(
    module: GraphModule, keep: frozenset[Node], placeholders: Iterable[Node] = ()
) -> frozenset[Node]:
    """Remove nodes that no output needs, and of these placeholders those that nothing reads any more.

    keep: nodes with effects (in-place updates, random draws). Returns the removed placeholders.
    """
    module.graph.eliminate_dead_code(is_impure_node=lambda n: n in keep or n.op in ("placeholder", "output"))
    unused = frozenset(node for node in placeholders if not node.users)
    for node in unused:
        module.graph.erase_node(node)
    for node in module.graph.nodes:
        if is_op(node, aten.convolution_backward.default):
            used = {int(user.args[1]) for user in node.users}  # type: ignore[arg-type]
            mask = [bool(m) and i in used for i, m in enumerate(node.args[-1])]  # type: ignore[arg-type]
            if any(mask):
                node.args = (*node.args[:-1], mask)
    relax_views(module)
    module.recompile()
    return unused


def relax_views(module: GraphModule) -> None:
    """Let `view` copy where real strides differ from the fake ones, except where the view is written to."""
    written: set[Node] = set()
    for node in module.graph.nodes:
        if node.op == "call_function" and is_mutation(node):
            source = node.args[0]
            while isinstance(source, Node) and source not in written:
                written.add(source)
                source = source.args[0] if is_op(source, *VIEWS) else None
    for node in module.graph.nodes:
        if is_op(node, *VIEWS) and node not in written:
            node.target = aten.reshape.default
