"""Graphs of the torch functions that are spliced: traced once, made small, found again by later captures.

Enters: a function of tensors and the nodes that are its arguments. Leaves: its graph. Of the traces that
outlive a capture the nodes know sizes alone. The constants that a function reads, tables that it made itself,
stay with its trace; of a model nothing does.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor
from torch.fx import Graph, Node

from kfac_fx import editing
from kfac_fx import graph as fxgraph
from kfac_fx.graph import VIEWS, aten, is_op

_RESIZES = (*VIEWS, aten.expand.default)
_MOST = 512
_lock = threading.Lock()
_everywhere: OrderedDict[Hashable, Trace] = OrderedDict()  # the last used at the end


@final
@dataclass(frozen=True, kw_only=True)
class Trace:
    """A traced function. names: of what it returns. constants: tensors that the graph reads, by target."""

    graph: Graph
    constants: Mapping[str, Tensor]
    names: tuple[str, ...]


def traced_once(
    function: Callable[..., Mapping[str, Tensor]],
    arguments: Sequence[Node],
    key: Hashable,
    known: dict[Hashable, Trace],
) -> Trace:
    """The function's graph, made small.

    arguments: nodes of one graph, whose values stand for the function's. key: equal for functions that
    compute the same from tensors of equal sizes; None for one that is traced anew. known: the traces of this
    graph. A key that is a tuple is looked for, and kept, beyond it.
    """
    values = [fxgraph.value(node) for node in arguments]
    place = (key, *((tuple(v.shape), v.stride(), v.dtype, v.device) for v in values))
    if key is not None and place in known:
        return known[place]
    cast = values[0].device.type
    lasting = (
        place,
        torch.get_default_dtype(),
        torch.is_autocast_enabled(cast),
        torch.get_autocast_dtype(cast),
    )
    found = _found(lasting) if isinstance(key, tuple) else None
    if found is not None:
        traced = _with_values(found, like=arguments[0])
    else:
        traced = _trace(function, arguments)
        if isinstance(key, tuple):
            _keep(lasting, traced)
    if key is not None:
        known[place] = traced
    return traced


def _found(key: Hashable) -> Trace | None:
    with _lock:
        if key in _everywhere:
            _everywhere.move_to_end(key)
        return _everywhere.get(key)


def _keep(key: Hashable, traced: Trace) -> None:
    with _lock:
        _everywhere[key] = _without_values(traced)
        while len(_everywhere) > _MOST:
            _everywhere.popitem(last=False)


def forget() -> None:
    """Forget the traces that later captures would find: after one of the traced functions was replaced."""
    with _lock:
        _everywhere.clear()


def _trace(function: Callable[..., Mapping[str, Tensor]], arguments: Sequence[Node]) -> Trace:
    names: list[str] = []

    def run(*tensors: Tensor) -> list[Tensor]:
        results = function(*tensors)
        names[:] = results
        return list(results.values())

    graph, constants = fxgraph.traced(run, arguments)
    _drop_idle_views(graph)
    return Trace(graph=graph, constants=constants, names=tuple(names))


def _drop_idle_views(graph: Graph) -> None:
    """Of views of views the last alone stays, and none that changes nothing."""
    for node in graph.nodes:
        if not is_op(node, *_RESIZES):
            continue
        read = node.args[0]
        while is_op(node, *VIEWS) and is_op(read, *VIEWS):
            read = read.args[0]
        node.update_arg(0, read)
        like, kept = fxgraph.value(read), fxgraph.value(node)
        if like.shape == kept.shape and like.stride() == kept.stride():
            node.replace_all_uses_with(read)
    graph.eliminate_dead_code()


def _without_values(traced: Trace) -> Trace:
    """A copy whose nodes know of their values the sizes alone. Constants are the same tensors."""
    graph, _ = editing.copy_graph(traced.graph)
    for node in graph.nodes:
        node.meta = {"val": fxgraph.tree_map(_described, node.meta["val"])} if "val" in node.meta else {}
    return replace(traced, graph=graph)


def _with_values(traced: Trace, *, like: Node) -> Trace:
    """A copy of what `_without_values` gave, with values that belong to the graph of `like`."""
    graph, _ = editing.copy_graph(traced.graph)
    with fxgraph.fake_mode(like.graph):
        for node in graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = fxgraph.tree_map(_remade, node.meta["val"])
    return replace(traced, graph=graph)


@final
@dataclass(frozen=True, kw_only=True)
class _Described:
    """Sizes of a value without the value."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _described(value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    return _Described(shape=tuple(value.shape), stride=value.stride(), dtype=value.dtype, device=value.device)


def _remade(value: object) -> object:
    if not isinstance(value, _Described):
        return value
    return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=value.device)
