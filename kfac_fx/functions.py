"""The torch functions that `instrument` traces into a graph and `step` runs alone: statistics, precondition.

Enters: a plan and tensors in a stated order. Leaves: tensors. No graph is read or written here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from kfac_fx.canonical import (
    from_matrices,
    gradient_names,
    initial_state,
    state_dtype,
    state_owner,
    to_matrix,
)
from kfac_fx.layers import KINDS
from kfac_fx.layers.statistics import MatchStatistics, UseValues
from kfac_fx.layout import lies_transposed
from kfac_fx.planned import Plan
from kfac_fx.stages import runs
from kfac_fx.types import LayerMatch, State, Use

KINDS_BY_NAME = {kind.name: kind for kind in KINDS}


def signature(plan: Plan, match: LayerMatch) -> Hashable:
    """All that decides what the functions below compute for a layer, but the sizes of its tensors.

    Layers of equal signatures differ in names and places alone. None: a method that cannot be compared.
    """
    if not isinstance(plan.method, Hashable):
        return None
    readers = tuple(_outline(other) for other in _readers(plan, match))
    return plan.method, plan.sharing, plan.capture.loss_info.ignores, _outline(match), readers


def _outline(match: LayerMatch) -> Hashable:
    """A match without names, nodes and lines."""
    uses = tuple(
        (
            use.a is None,
            len(use.g),
            use.absent,
            len(use.operands),
            use.geometry,
            use.scale,
            use.bias,
            repr(sorted(use.options.items())),
        )
        for use in match.uses
    )
    bias = None if match.bias is None else "bias"
    return replace(match, uses=(), name="", key="", weight="", bias=bias, shared_a="", source=None), uses


def layer_function(
    plan: Plan, match: LayerMatch, names: list[str], state_names: list[str]
) -> Callable[..., dict[str, Tensor]]:
    """(gradients of weight and bias, state tensors) -> canonical gradient and direction of one layer."""

    def run(*tensors: Tensor) -> dict[str, Tensor]:
        matrix = to_matrix(match, dict(zip(names, tensors, strict=False)))
        state = dict(zip(state_names, tensors[len(names) :], strict=True))
        return {"gradient": matrix, "direction": plan.method.precondition(state, matrix)}

    return run


def use_nodes(match: LayerMatch) -> list[Node]:
    """Nodes that the statistics of a match read, in the order of `_use_values`."""
    nodes: list[Node] = []
    for use in match.uses:
        nodes += [*([] if use.a is None else [use.a]), *use.operands, *fisher_gradients(use)]
    return nodes


def _readers(plan: Plan, match: LayerMatch) -> list[LayerMatch]:
    """Other layers that share this layer's A, where their gradients decide which rows count."""
    if not plan.capture.loss_info.ignores or match.structure != "kronecker":
        return []
    return [other for other in plan.matched if other.shared_a == match.key and other is not match]


def reader_nodes(plan: Plan, match: LayerMatch) -> list[Node]:
    """Nodes of the layers that share this layer's A."""
    return [node for other in _readers(plan, match) for node in use_nodes(other)]


def _reader_values(
    plan: Plan, match: LayerMatch, tensors: Sequence[Tensor]
) -> tuple[tuple[UseValues, ...], ...]:
    values, start = [], 0
    for other in _readers(plan, match):
        stop = start + len(use_nodes(other))
        values.append(use_values(other, tensors[start:stop]))
        start = stop
    return tuple(values)


def fisher_gradients(use: Use) -> tuple[Node, ...]:
    """The `g` of the passes that feed the Fisher: the later ones if there are any, else the training pass."""
    return use.g[1:] or use.g


def use_values(
    match: LayerMatch, tensors: Sequence[Tensor], *, training: bool = False
) -> tuple[UseValues, ...]:
    """Give each use the values of its nodes, and zeros where a pass does not reach it.

    training: `g` of the training pass alone.
    """
    source, values = iter(tensors), []
    for use in match.uses:
        a = None if use.a is None else next(source)
        operands = tuple(next(source) for _ in use.operands)
        count = 1 if training else len(fisher_gradients(use))
        g = [next(source) for _ in range(count)]
        for place in () if training else use.absent:
            g.insert(place, torch.zeros_like(g[0]))
        values.append(UseValues(use=use, a=a, operands=operands, g=tuple(g)))
    return tuple(values)


def statistics_function(
    plan: Plan, match: LayerMatch, wanted: Sequence[str]
) -> Callable[..., dict[str, Tensor]]:
    """(nodes of `use_nodes`, 1/R_, nodes of `reader_nodes`, the layer's state) -> the batch's statistics.

    wanted: their names.
    """
    num_nodes, num_read = len(use_nodes(match)), len(reader_nodes(plan, match))
    names = list(initial_state(plan, match))
    start = num_nodes + 1 + num_read

    def run(*tensors: Tensor) -> dict[str, Tensor]:
        statistics = MatchStatistics(
            match=match,
            uses=use_values(match, tensors[:num_nodes]),
            kinds=KINDS_BY_NAME,
            inverse_scale=tensors[num_nodes],
            sharing=plan.sharing,
            ignores=plan.capture.loss_info.ignores,
            readers=_reader_values(plan, match, tensors[num_nodes + 1 : start]),
            rounded=plan.rounds_rows,
        )
        dtype = state_dtype(plan, match)
        state = dict(zip(names, tensors[start:], strict=True))
        batch = plan.method.batch_statistics(statistics, wanted, state)
        return {name: batch[name].to(dtype) for name in wanted}

    return run


def fold_function(plan: Plan, match: LayerMatch, wanted: Sequence[str]) -> Callable[..., dict[str, Tensor]]:
    """(the batch's statistics, the layer's state, 1/R_, the layer's weight) -> the changed state."""
    names = list(initial_state(plan, match))

    def run(*tensors: Tensor) -> dict[str, Tensor]:
        batch = dict(zip(wanted, tensors, strict=False))
        state = dict(zip(names, tensors[len(wanted) : -2], strict=True))
        return plan.method.fold(state, batch, weight=tensors[-1], inverse_scale=tensors[-2])

    return run


def state_keys(plan: Plan) -> list[tuple[str, str]]:
    """(key, name) of every state tensor that this plan's layers read."""
    keys = [
        (state_owner(plan, match, name), name)
        for match in plan.matched
        for name in initial_state(plan, match)
    ]
    return list(dict.fromkeys(keys))


def precondition_function(plan: Plan, keys: Sequence[tuple[str, str]]) -> Callable[..., list[Tensor]]:
    """(gradients of `gradient_names`, state tensors of `keys`, learning rates) -> preconditioned
    gradients.
    """
    names = gradient_names(plan)

    def run(*tensors: Tensor) -> list[Tensor]:
        gradients = dict(zip(names, tensors[: len(names)], strict=True))
        flat = dict(zip(keys, tensors[len(names) : -1], strict=True))
        matrices = [to_matrix(match, gradients) for match in plan.matched]
        directions = [
            plan.method.precondition(_layer_state(plan, match, flat), matrix)
            for match, matrix in zip(plan.matched, matrices, strict=True)
        ]
        if runs("lengths", plan.without):
            directions = plan.method.rescale(directions, matrices, learning_rates=tensors[-1])
        return list(from_matrices(plan, directions, gradients).values())

    return run


def products(directions: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """<V, grad> of each layer, at least in float32: [layers], at least one."""
    found = []
    for v, gradient in zip(directions, gradients, strict=True):
        dtype = torch.promote_types(v.dtype, torch.float32)
        v, gradient = v.to(dtype), gradient.to(dtype)
        if v.dim() > 1 and lies_transposed(v) and lies_transposed(gradient):
            v, gradient = v.mT, gradient.mT
        found.append(torch.dot(v.flatten(), gradient.flatten()))
    return torch.stack(found)


def update_products(
    plan: Plan, directions: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> Tensor | None:
    """`products` of tensors in the shapes of their parameters; None where the plan asks for none."""
    if not plan.matched or not runs("products", plan.without):
        return None
    return products(*([to_matrix(match, part) for match in plan.matched] for part in (directions, gradients)))


def _layer_state(plan: Plan, match: LayerMatch, flat: Mapping[tuple[str, str], Tensor]) -> State:
    names = initial_state(plan, match)
    return {name: flat[state_owner(plan, match, name), name] for name in names}
