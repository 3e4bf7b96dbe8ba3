"""Small layers of equal shape that are preconditioned together: which they are, and the function of them.

Enters: the layers of a plan, the nodes that each preconditioner may read, the graph of one. Leaves: groups of
layers, and one torch function of each group. Writes no graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.fx import Node

from kfac_fx import graph as fxgraph
from kfac_fx.functions import signature
from kfac_fx.planned import Plan
from kfac_fx.stages import runs
from kfac_fx.traces import Trace
from kfac_fx.types import LayerMatch

_AROUND = 5  # calls that a stack needs beside those of its tensors
_MOST_BYTES = 2**26  # of what one stack copies


@final
@dataclass(frozen=True, kw_only=True)
class _Rates:
    """Nanoseconds per operator, and per byte that is copied."""

    call: float
    byte: float


# CPU: fitted to tests/benchmarks/stack_time.py. CUDA: from data sheets (3 microseconds per kernel, 2 TB/s,
# each byte read and written), not measured.
_RATES = {"cpu": _Rates(call=6000, byte=0.15), "cuda": _Rates(call=3000, byte=0.001)}


def stacking_pays(num_layers: int, one: Trace) -> bool:
    """Whether one call over stacked layers is estimated to take less time than a call for each.

    one: what a single layer computes. What is saved are the operators of all layers but one; what is paid is
    one `stack` per tensor that is read, with a copy of it for each layer, and views of the parts.
    """
    read = [fxgraph.value(node) for node in one.graph.find_nodes(op="placeholder") if node.users]
    operators = sum(n.op == "call_function" and not fxgraph.may_alias(n) for n in one.graph.nodes)
    rates = _RATES.get(read[0].device.type, _RATES["cuda"])
    copied = num_layers * sum(tensor.numel() * tensor.element_size() for tensor in read)
    paid = (len(read) + _AROUND) * rates.call + copied * rates.byte
    return copied <= _MOST_BYTES and paid < (num_layers - 1) * operators * rates.call


def groups(plan: Plan, read: Mapping[str, Sequence[Node]]) -> Iterator[list[LayerMatch]]:
    """Layers that compute the same from tensors of equal sizes; each of the plan's layers once.

    read: by layer, the gradients and the state tensors that its preconditioner may read.
    """
    alike: dict[Hashable, list[LayerMatch]] = {}
    for match in plan.matched:
        same = signature(plan, match) if runs("stacks", plan.without) else None
        values = [fxgraph.value(node) for node in read[match.key]]
        kind = tuple((value.shape, value.dtype, value.device) for value in values)
        alike.setdefault(match.key if same is None else (same, kind), []).append(match)
    yield from alike.values()


def stacked(one: Callable[..., Mapping[str, Tensor]], num_layers: int) -> Callable[..., dict[str, Tensor]]:
    """(tensors of the first layer, of the next, ...) -> what `one` gives for each, names with its position.

    one: of a single layer; it runs over a further axis. No two results lie in the same memory.
    """

    def run(*tensors: Tensor) -> dict[str, Tensor]:
        num_read = len(tensors) // num_layers
        columns = [torch.stack(tensors[place::num_read]) for place in range(num_read)]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "There is a performance drop")  # vmap would run a loop
            found = torch.vmap(one)(*columns)
        parts = {name: results.contiguous().unbind() for name, results in found.items()}
        return {f"{name} {i}": part[i] for name, part in parts.items() for i in range(num_layers)}

    return run
