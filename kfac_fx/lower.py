"""Graph -> callable: eager fx code or torch.compile, and what must be saved before a step that may fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from kfac_fx import graph as fxgraph
from kfac_fx.errors import check_choice
from kfac_fx.walk import base

BACKENDS = ("auto", "eager", "inductor")


def resolve_backend(backend: str, device: torch.device) -> str:
    """auto: inductor on CUDA, eager elsewhere (on a CPU the fx code is as fast as eager autograd)."""
    check_choice("backend", backend, BACKENDS)
    if backend == "auto":
        return "inductor" if device.type == "cuda" else "eager"
    return backend


def lower(module: GraphModule, backend: str) -> Callable[..., Sequence[Tensor]]:
    """A callable over the module's placeholders. inductor.

    One graph, no break (`fullgraph=True`), static shapes.
    """
    run: Callable[..., Any] = module
    if backend == "inductor":
        run = torch.compile(module, fullgraph=True, dynamic=False)

    def call(*tensors: Tensor) -> Sequence[Tensor]:
        with execution():
            return run(*tensors)

    return call


@contextmanager
def execution() -> Iterator[None]:
    """How a captured program runs: its casts are in the graph, its backward too."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def mutated_placeholders(module: GraphModule) -> tuple[int, ...]:
    """Positions of placeholders that the program changes in place (running statistics)."""
    placeholders = module.graph.find_nodes(op="placeholder")
    found = set()
    for node in module.graph.nodes:
        if node.op == "call_function" and (fxgraph.is_mutation(node) or node.target in fxgraph.BATCH_NORMS):
            read = node.all_input_nodes if node.target in fxgraph.BATCH_NORMS else node.all_input_nodes[:1]
            found.update(base(argument) for argument in read)
    return tuple(
        i for i, node in enumerate(placeholders) if node in found and not str(node.target).startswith("p_")
    )
