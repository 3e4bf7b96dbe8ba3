"""Small programs of torch functions, as the passes for eager programs get them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx


def program(function: Callable[..., Any], *tensors: Tensor) -> GraphModule:
    """A program all of whose operators were inserted."""
    module = make_fx(function, tracing_mode="fake")(*tensors)
    module.graph.eliminate_dead_code()
    for node in module.graph.nodes:
        node.meta["kfac_fx"] = "inserted, for a test"
    return module
