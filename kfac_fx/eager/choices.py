"""One of two whole tensors, picked on the host instead of copied entry by entry.

Enters: a graph. Leaves: the same, where the average that is kept is the new tensor or the old one itself.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.fx import Graph, Node

from kfac_fx.graph import aten, is_op, value


def choose_whole(graph: Graph, is_large: Callable[[Node], bool]) -> None:
    """Of `where` with one condition for all entries, where the second tensor is state.

    The program may then return a tensor of the state itself: state is replaced, and never written to.
    """
    for node in graph.nodes:
        if is_op(node, aten.where.self) and is_large(node) and _is_state(node.args[2]):
            condition, *both = (value(read) for read in node.args)  # type: ignore[arg-type]
            kind = value(node).shape, value(node).dtype, value(node).device
            if condition.numel() == 1 and all((t.shape, t.dtype, t.device) == kind for t in both):
                node.target = chosen


def _is_state(node: object) -> bool:
    return isinstance(node, Node) and node.op == "placeholder" and str(node.target).startswith("s_")


def chosen(condition: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The first tensor itself, or the second."""
    return first if bool(condition) else second
