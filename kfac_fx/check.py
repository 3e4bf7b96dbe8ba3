"""The universal property of a match: `sum of g a^T` over its uses is the gradient that autograd computed.

Enters: a plan. Leaves: an fx module that returns both sides for every match, so that they can be compared on
real data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kfac_fx import graph as fxgraph
from kfac_fx.canonical import to_matrix
from kfac_fx.contracts import Plan
from kfac_fx.functions import KINDS_BY_NAME, use_values
from kfac_fx.layers.statistics import UseValues
from kfac_fx.splice import splice
from kfac_fx.types import LayerMatch


def gradient_pairs(plan: Plan) -> GraphModule:
    """A module over the capture's placeholders that returns, per match, (canonical gradient of autograd, of
    `a` and `g`).
    """
    module, mapping = fxgraph.copy_module(plan.capture.graph)
    output = module.graph.output_node()
    results: list[Node] = []
    for match in plan.matched:
        nodes: list[Node] = []
        for use in match.uses:
            nodes += [*([] if use.a is None else [use.a]), *use.operands, use.g[0]]
        own = [name for name in (match.weight, match.bias) if name is not None]
        arguments = [mapping[plan.capture.gradients[name]] for name in own] + [mapping[n] for n in nodes]

        def run(*tensors: Tensor, match: LayerMatch = match, own: Sequence[str] = own) -> dict[str, Tensor]:
            gradients = dict(zip(own, tensors, strict=False))
            values = use_values(match, tensors[len(own) :], training=True)
            return {
                "autograd": to_matrix(match, gradients).contiguous(),
                "match": reconstructed(match, values),
            }

        results += splice(module, run, arguments, before=output, label=f"check of {match.name}").values()
    output.args = (tuple(results),)
    keep = frozenset(mapping[n] for n in plan.capture.graph.graph.nodes if fxgraph.has_effect(n))
    fxgraph.eliminate_dead(module, keep)
    return module


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
