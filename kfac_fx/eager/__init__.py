"""Large statistics of programs that run as they are written, with fewer passes over memory.

A factor of 4,608 columns takes 85 MB. To write its blocks, join them, divide, average, and keep the old one
where the new is not finite would each write as much again. What is compiled is fused in another way. Enters:
a program. Leaves: one that computes the same. The user's own operators stay as they are.
"""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node

from kfac_fx.eager.averages import average_in_products
from kfac_fx.eager.blocks import JOINS
from kfac_fx.eager.choices import choose_whole
from kfac_fx.eager.placing import place_blocks
from kfac_fx.eager.reuse import WRITES_INTO, write_into_operands
from kfac_fx.editing import copy_module, is_inserted
from kfac_fx.graph import is_op, value

LEAST_BYTES = 2**18  # of a result; less is not worth the operators


def rewritten(module: GraphModule, *, reads: bool, least_bytes: int | None = None) -> GraphModule:
    """The program, in which statistics of at least `LEAST_BYTES` use memory again and are written in place.

    reads: whether values may be read on the host while it runs. least_bytes: another limit. As it is where
    nothing is that large.
    """
    least = LEAST_BYTES if least_bytes is None else least_bytes

    def is_large(node: Node) -> bool:
        return node.op == "call_function" and is_inserted(node) and _bytes(node) >= least

    if not any(is_large(node) and is_op(node, *JOINS, *WRITES_INTO) for node in module.graph.nodes):
        return module
    changed, _ = copy_module(module)
    if reads:
        average_in_products(changed.graph, is_large)
        choose_whole(changed.graph, is_large)
    write_into_operands(changed.graph, is_large)
    place_blocks(changed.graph, is_large)
    changed.recompile()
    return changed


def _bytes(node: Node) -> int:
    return value(node).nbytes if isinstance(node.meta["val"], Tensor) else 0
