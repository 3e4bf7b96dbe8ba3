"""Where the forward half reads a parameter, for reasons that name the user's line.

Enters: a parameter of a captured graph. Leaves: nodes.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from torch.fx import Node

from kfac_fx.graph import aten, descendants, is_op, shape
from kfac_fx.sources import user_source
from kfac_fx.traced import Capture, Parameter
from kfac_fx.walk import base, structural_step

_POINTWISE = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)


def forward_uses(parameter: Parameter, capture: Capture) -> list[Node]:
    """Operations of the forward half that read it, behind views and expansions, in their order."""
    found, queue = [], [parameter.node]
    while queue:
        for user in queue.pop(0).users:
            if user in capture.backward or user.op != "call_function":
                continue
            moved = structural_step(user) is not None or is_op(user, aten.expand.default)
            (queue if moved else found).append(user)
    return list(dict.fromkeys(found))


def spread_over_stored(parameter: Parameter, capture: Capture) -> Node | None:
    """The operation that broadcasts it over another parameter or a buffer before the batch comes in.

    The sum in its gradient then runs over that tensor's axes, not over examples.
    """
    others = [p.node for p in capture.parameters if p.name != parameter.name]
    stored = descendants([*others, *capture.buffers.values()])
    for use in forward_uses(parameter, capture):
        if not is_op(use, *_POINTWISE) or use in capture.data:
            continue
        if math.prod(shape(use)) > parameter.numel and any(node in stored for node in use.all_input_nodes):
            return use
    return None


def other_use(parameter: Parameter, capture: Capture, inputs: Collection[Node]) -> Node | None:
    """The first use of it with none of these layer inputs."""
    known = {base(node) for node in inputs}
    uses = forward_uses(parameter, capture)
    return next((use for use in uses if known.isdisjoint(map(base, use.all_input_nodes))), None)


def told(node: Node) -> str:
    """The operation with the user's line, if that is known."""
    source = user_source(node.meta.get("stack_trace"))
    line = "" if source is None else f" at {source}"
    return f"{node.target}{line}"
