"""The universal property of a match: `sum of g a^T` over its uses is the gradient that autograd computed.

Enters: a plan. Leaves: a function that returns both sides for every match, so that they can be compared on
real data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from kfac_fx import editing
from kfac_fx import graph as fxgraph
from kfac_fx.canonical import to_matrix
from kfac_fx.functions import KINDS_BY_NAME, use_values
from kfac_fx.layers.statistics import UseValues
from kfac_fx.planned import Plan
from kfac_fx.types import LayerMatch


def gradient_pairs(plan: Plan) -> Callable[..., list[Tensor]]:
    """A function of the capture's placeholders that returns, per match, (canonical gradient of autograd, of
    `a` and `g`).
    """
    module, mapping = editing.copy_module(plan.capture.graph)
    read = [
        [*(plan.capture.gradients[name] for name in _own(match)), *_training_nodes(match)]
        for match in plan.matched
    ]
    nodes = list(dict.fromkeys(mapping[node] for own in read for node in own))
    module.graph.output_node().args = (tuple(nodes),)
    keep = frozenset(mapping[n] for n in plan.capture.graph.graph.nodes if fxgraph.has_effect(n))
    editing.eliminate_dead(module, keep)

    def run(*tensors: Tensor) -> list[Tensor]:
        with torch.no_grad():
            values = dict(zip(nodes, module(*tensors), strict=True))
            pairs = [
                _pair(match, [values[mapping[node]] for node in own])
                for match, own in zip(plan.matched, read, strict=True)
            ]
        return [tensor for pair in pairs for tensor in pair]

    return run


def _own(match: LayerMatch) -> list[str]:
    return [name for name in (match.weight, match.bias) if name is not None]


def _training_nodes(match: LayerMatch) -> list[Node]:
    """What `use_values` reads of the training pass."""
    nodes: list[Node] = []
    for use in match.uses:
        nodes += [*([] if use.a is None else [use.a]), *use.operands, use.g[0]]
    return nodes


def _pair(match: LayerMatch, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Both sides. tensors: gradients of weight and bias, then the values of `_training_nodes`."""
    own = _own(match)
    values = use_values(match, tensors[len(own) :], training=True)
    gradients = dict(zip(own, tensors, strict=False))
    return to_matrix(match, gradients), reconstructed(match, values)


def reconstructed(match: LayerMatch, uses: Sequence[UseValues]) -> Tensor:
    """Canonical gradient from `a` and `g` alone: [groups, d_out, d_in(+1)], or [channels, k] for blocks."""
    return torch.stack([_one_use(match, values) for values in uses]).sum(0)


def _one_use(match: LayerMatch, values: UseValues) -> Tensor:
    kind, use = KINDS_BY_NAME[values.use.options["kind"]], values.use
    g = kind.output_rows(use, values.g[0], values.operands) * use.scale
    if match.structure == "block":
        return _block(match, values, g)
    assert values.a is not None
    a = kind.input_rows(use, values.a, values.operands)
    flat_g = g.reshape(g.shape[0], -1, g.shape[-1])
    if use.options["kind"] == "embedding":
        kept = (a != use.options["padding_idx"]).to(g.dtype).unsqueeze(-1)
        table = torch.zeros(match.d_in, g.shape[-1], dtype=g.dtype, device=g.device)
        return table.index_add(0, a, flat_g[0] * kept).mT.unsqueeze(0)
    flat_a = a.reshape(a.shape[0], -1, a.shape[-1]).to(g.dtype)
    if match.bias is not None:
        ones = torch.full_like(flat_a[..., :1], float(use.bias))
        flat_a = torch.cat([flat_a, ones], -1)
    product = flat_g.mT @ flat_a
    return product.mT if use.options["swapped"] else product


def _block(match: LayerMatch, values: UseValues, g: Tensor) -> Tensor:
    kind, use = KINDS_BY_NAME[values.use.options["kind"]], values.use
    shift = g.sum((0, 1))
    if values.a is None:
        return shift.unsqueeze(-1)
    scale = (g * kind.input_rows(use, values.a, values.operands).to(g.dtype)).sum((0, 1))
    if match.bias is None:
        return scale.unsqueeze(-1)
    return torch.stack([scale, shift * float(use.bias)], -1)
