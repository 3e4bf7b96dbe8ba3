"""Graph -> callable: eager fx code, or torch.compile, on CUDA with CUDA graphs and what was inserted in full
float32; and what must be saved before a step that may fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kfac_fx import editing, host, precision
from kfac_fx import graph as fxgraph
from kfac_fx.eager import rewritten
from kfac_fx.errors import check_choice
from kfac_fx.walk import base

BACKENDS = ("auto", "eager", "inductor", "inductor-no-cudagraphs")

Callee = Callable[..., Sequence[Tensor]]


def resolve_backend(backend: str, device: torch.device) -> str:
    """auto: inductor on CUDA, eager elsewhere (on a CPU the fx code is as fast as eager autograd).

    "inductor" replays CUDA graphs on CUDA; "inductor-no-cudagraphs" launches kernels one by one.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "auto":
        return "inductor" if device.type == "cuda" else "eager"
    return backend


def uses_cuda_graphs(backend: str, device: torch.device) -> bool:
    """Whether programs of this resolved backend are replayed as CUDA graphs."""
    return backend == "inductor" and device.type == "cuda"


def compile_mode(backend: str, device: torch.device) -> str | None:
    """The mode of torch.compile for a resolved backend; None where nothing is compiled."""
    if backend == "eager":
        return None
    return "reduce-overhead" if uses_cuda_graphs(backend, device) else "default"


def lower(module: GraphModule, backend: str) -> Callee:
    """A callable over the module's placeholders, whose outputs are the caller's. backend: a resolved one."""
    device = fxgraph.value(module.graph.output_node().all_input_nodes[0]).device
    mode = compile_mode(backend, device)
    module = with_full_float32(module) if device.type == "cuda" else module
    reads = device.type == "cpu" and not host.waits(device)
    run = rewritten(module, reads=reads) if mode is None else compiled(module, mode)
    if uses_cuda_graphs(backend, device):
        run = _owning(run, mutated_placeholders(module))

    def call(*tensors: Tensor) -> Sequence[Tensor]:
        with execution():
            return run(*tensors)

    return call


def compiled(module: GraphModule, mode: str) -> Callee:
    """By torch.compile: one graph, no break (`fullgraph=True`), static shapes."""
    return torch.compile(module, fullgraph=True, dynamic=False, mode=mode)


def _owning(run: Callee, mutated: Sequence[int]) -> Callee:
    """A program that is replayed as a CUDA graph, with outputs that outlive its next run.

    mutated: positions of the inputs that it changes in place.

    A replay writes its outputs where the last one of any program did, so they are copied: gradients and new
    state once per step. Inputs are read where they were when the graph was recorded: torch copies there what
    has moved (state and batch); parameters stay. Buffers that the program changes have to be declared to
    stay, else torch runs it without a graph; it records anew where one was replaced.
    """

    def call(*tensors: Tensor) -> Sequence[Tensor]:
        for place in mutated:
            torch._dynamo.mark_static_address(tensors[place])
        torch.compiler.cudagraph_mark_step_begin()
        return [output.clone() for output in run(*tensors)]

    return call


def with_full_float32(module: GraphModule) -> GraphModule:
    """The program with products of float32 that were inserted into it never in TF32.

    The model's own products keep what the user allows.
    """
    changed, _ = editing.copy_module(module)
    for node in changed.graph.nodes:
        if not editing.is_inserted(node):
            continue
        if node.target in precision.OPERATORS and fxgraph.value(node).dtype == torch.float32:
            node.target = precision.OPERATORS[node.target]
        elif fxgraph.is_op(node, fxgraph.aten.convolution_backward.default):
            _weight_gradient_alone(node)
    changed.recompile()
    return changed


def _weight_gradient_alone(node: Node) -> None:
    """Statistics read of a convolution's backward the gradient of the weight, if anything."""
    assert list(node.args[-1]) == [False, True, False], "statistics read the gradient of the weight alone"  # type: ignore[arg-type]
    (part,) = node.users
    if fxgraph.value(part).dtype != torch.float32:
        return
    part.target, part.args = precision.WEIGHT_GRADIENT, node.args[:-1]
    node.graph.erase_node(node)


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
            changed = node.args[3:5] if node.target in fxgraph.BATCH_NORMS else node.all_input_nodes[:1]
            found.update(base(argument) for argument in changed if isinstance(argument, Node))
    return tuple(
        i for i, node in enumerate(placeholders) if node in found and not str(node.target).startswith("p_")
    )
