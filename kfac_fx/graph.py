"""Read fx nodes, trace torch functions.

Enters: graphs made by `capture`; functions of tensors. Leaves: facts about nodes (value, source line, what
depends on them, effects), and graphs of ordinary torch functions. Nothing here knows a layer kind or a
method; copies and edits of graphs are in `editing`.
"""

from __future__ import annotations

import functools
import operator
import threading
import traceback
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from kfac_fx.errors import CaptureError, KfacFxError
from kfac_fx.sources import user_source
from kfac_fx.types import Source

aten = torch.ops.aten
TRACING = threading.RLock()  # torch patches modules while it traces, and takes no second tracer beside it
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
BATCH_NORMS = (aten.native_batch_norm.default, aten.cudnn_batch_norm.default)
tree_flatten, tree_unflatten, tree_leaves, tree_map = (
    pytree.tree_flatten,
    pytree.tree_unflatten,
    pytree.tree_leaves,
    pytree.tree_map,
)


def is_op(node: object, *targets: object) -> bool:
    """Whether `node` is a call of one of these operators."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def value(node: Node) -> Tensor:
    """The fake tensor that stands for the node's value."""
    found = node.meta["val"]
    assert isinstance(found, Tensor), f"{node} has no tensor value"
    return found


def shape(node: Node) -> tuple[int, ...]:
    """Static shape of the node's value."""
    sizes = value(node).shape
    if all(map(_is_int, sizes)):
        return tuple(sizes)
    source = _source_behind(node)
    where = f"at {source.file}:{source.line} ({source.code})" if source else f"at node {node.name}"
    raise CaptureError(
        f"the number of rows of a tensor depends on the data, {where}. Keep all rows and multiply by a mask."
    )


def _is_int(size: object) -> bool:
    return isinstance(size, int)


def _source_behind(node: Node) -> Source | None:
    """The user's line of the node, or of the nearest node that it reads."""
    queue, seen = [node], {node}
    while queue:
        current = queue.pop(0)
        source = user_source(current.meta.get("stack_trace"))
        if source is not None:
            return source
        for read in current.all_input_nodes:
            if read not in seen:
                seen.add(read)
                queue.append(read)
    return None


def descendants(seeds: Iterable[Node]) -> frozenset[Node]:
    """The seeds and every node that depends on one of them."""
    found: set[Node] = set(seeds)
    queue = list(found)
    while queue:
        for user in queue.pop().users:
            if user not in found:
                found.add(user)
                queue.append(user)
    return frozenset(found)


def getitem_source(node: Node) -> tuple[Node, int] | None:
    """(producer, index) if the node selects one output of a multi-output operator."""
    if node.op == "call_function" and node.target is operator.getitem:
        return node.args[0], int(node.args[1])  # type: ignore[return-value,arg-type]
    return None


def fake_mode(graph: Graph) -> FakeTensorMode:
    """The fake tensor mode under which the graph's example values live."""
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            return node.meta["val"].fake_mode
    raise AssertionError("the graph carries no fake values")


def fake_empty(graph: Graph, sizes: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A fake tensor for a new placeholder of the graph."""
    with fake_mode(graph):
        return torch.empty(tuple(sizes), dtype=dtype, device=device)


def traced(
    function: Callable[..., Sequence[Tensor]], arguments: Sequence[Node]
) -> tuple[Graph, dict[str, Tensor]]:
    """The graph of a function of tensors like the fake values of `arguments`, which belong to one graph, and
    the real tensors that it reads, by target.

    Tracing tells tensors apart by identity, so that a value that stands twice is given as two. Raises
    `KfacFxError` if the function works in place.
    """
    values: dict[int, Tensor] = {}
    with fake_mode(arguments[0].graph) as mode:
        for tensor in map(value, arguments):
            if id(tensor) in values:
                sizes, strides = tensor.shape, tensor.stride()
                tensor = torch.empty_strided(sizes, strides, dtype=tensor.dtype, device=tensor.device)
            values[id(tensor)] = tensor
        recorder = _Recorder(mode, list(values.values()))
        with TRACING, recorder:
            results = function(*values.values())
        graph = recorder.graph
        graph.output(tuple(recorder.node(result) for result in results))
    graph.eliminate_dead_code()
    return graph, recorder.constants


class _Recorder(TorchDispatchMode):
    """Writes down the operators that run under it, on fake tensors, as a graph.

    What `make_fx` gives for such functions, which know no autograd and no symbols, in less time.
    """

    def __init__(self, mode: FakeTensorMode, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph, self.constants = Graph(), dict[str, Tensor]()
        self._mode, self._met_real = mode, False
        self._nodes: dict[int, tuple[Node, Tensor]] = {}  # with the tensor, whose id is then not used again
        for number, tensor in enumerate(inputs):
            self._know(tensor, self.graph.placeholder(f"arg{number}_1"))

    def _know(self, tensor: Tensor, node: Node) -> None:
        self._nodes[id(tensor)] = node, tensor
        node.meta.setdefault("val", tensor)

    def node(self, argument: Any) -> Any:
        """The node of a tensor; a real one becomes a constant. Anything else as it is."""
        if not isinstance(argument, Tensor):
            return argument
        self._met_real |= not isinstance(argument, FakeTensor)
        if id(argument) not in self._nodes:
            assert not isinstance(argument, FakeTensor), "a fake tensor from outside of the trace"
            name = f"_tensor_constant{len(self.constants)}"
            self.constants[name] = argument
            self._know(argument, self.graph.get_attr(name))
            self.node(argument).meta["val"] = self._mode.from_tensor(argument)
        return self._nodes[id(argument)][0]

    def _fake(self, argument: Any) -> Any:
        real = isinstance(argument, Tensor) and not isinstance(argument, FakeTensor)
        return value(self.node(argument)) if real else argument

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_mutable(func):
            raise KfacFxError(_in_place(func))
        self._met_real = False
        read, named = map_aggregate(args, self.node), map_aggregate(kwargs, self.node)
        if self._met_real:
            args, kwargs = map_aggregate(args, self._fake), map_aggregate(kwargs, self._fake)
        result = func(*args, **kwargs)
        if not isinstance(result, (Tensor, list, tuple)):
            return result  # a size
        if func is aten.detach.default and isinstance(result, Tensor):
            self._know(result, read[0])
            return result
        node = self.graph.create_node("call_function", func, read, named, func.overloadpacket.__name__)
        if isinstance(result, Tensor):
            self._know(result, node)
            return result
        node.meta["val"] = result
        for number, part in enumerate(result):
            if isinstance(part, Tensor):
                self._know(part, self.graph.call_function(operator.getitem, (node, number)))
        return result


def _in_place(operator: torch._ops.OpOverload) -> str:
    """What to do about this operator, and the line of the user's that calls it, if it is one of theirs."""
    source = user_source("".join(traceback.format_stack()))
    where = f" ({source}: {source.code})" if source else ""
    return (
        f"a function that is written into the program works in place, by {operator}{where}. Functions of a "
        "method have to leave their arguments as they are: write x * 2 instead of x.mul_(2), and "
        "torch.where or torch.stack instead of x[i] = y."
    )


@functools.lru_cache(maxsize=64)
def constant(function: Callable[..., Tensor], *arguments: Hashable) -> Tensor:
    """`function(*arguments)`, computed now and once: a traced graph reads the tensor, not how it was made."""
    with _disable_current_modes(), torch.no_grad(), torch.device("cpu"):
        return function(*arguments)


def named_arguments(node: Node) -> dict[str, Any]:
    """Arguments of a call of an operator that the call states, by the names of its schema."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def has_effect(node: Node) -> bool:
    """Whether running the node changes a tensor in place or draws random numbers."""
    return is_random(node) or is_mutation(node)


def is_mutation(node: Node) -> bool:
    """Whether running the node changes one of its arguments in place."""
    return _is_mutable(node.target)


def may_alias(node: Node) -> bool:
    """Whether the node may return memory of what it reads."""
    if not isinstance(node.target, torch._ops.OpOverload) or is_op(node, *VIEWS):
        return True
    return any(result.alias_info is not None for result in node.target._schema.returns)


def _is_mutable(target: object) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def assigns_placeholder(node: Node) -> bool:
    """Whether the node writes a whole new value into a placeholder (a buffer that forward assigned anew)."""
    if not is_op(node, aten.copy_.default):
        return False
    return isinstance(node.args[0], Node) and node.args[0].op == "placeholder"


def is_random(node: Node) -> bool:
    """Whether running the node draws random numbers."""
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
    )
