"""Rows of a layer from the values of the nodes that its match names: for layers that are no plain module.

That these are the right nodes is what the gradient check shows: `sum of g a^T` is the gradient of eager
PyTorch, with a and g from here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from kfac_fx import editing
from kfac_fx import graph as fxgraph
from kfac_fx.lower import lower
from kfac_fx.planned import Plan
from kfac_fx.types import LayerMatch, Use
from kfac_fx.verification.patches import Window, im2col
from kfac_fx.verification.rows import BlockRows, UseRows

Values = dict[Node, Tensor]


def node_values(plan: Plan, arguments: list[Tensor]) -> Values:
    """Values of all nodes that matches name, and of the seeds of the backward passes, in one run."""
    wanted: list[Node] = [passed.seed for passed in plan.capture.passes]
    wanted.append(plan.capture.inverse_scale)
    for use in (use for match in plan.matched for use in match.uses):
        wanted += [*([] if use.a is None else [use.a]), *use.operands, *use.g]
    wanted = list(dict.fromkeys(wanted))
    module, mapping = editing.copy_module(plan.capture.graph)
    module.graph.output_node().args = (tuple(mapping[node] for node in wanted),)
    keep = frozenset(mapping[n] for n in plan.capture.graph.graph.nodes if fxgraph.has_effect(n))
    editing.eliminate_dead(module, keep)
    return dict(zip(wanted, lower(module, "eager")(*arguments), strict=True))


def kronecker_rows(match: LayerMatch, values: Values) -> list[UseRows]:
    """Rows of each use of a layer with factors A and G."""
    return [_use_rows(match, use, values) for use in match.uses]


def block_rows(match: LayerMatch, values: Values) -> list[BlockRows]:
    """Rows of each use of scales and shifts."""
    return [_block_rows(use, values) for use in match.uses]


def _gradients(use: Use, values: Values) -> list[Tensor]:
    """Of each pass that reaches the layer: zeros where it does not reach this use."""
    found = [values[node] * use.scale for node in use.g]
    for place in use.absent:
        found.insert(place + 1, torch.zeros_like(found[0]))
    return found


def _use_rows(match: LayerMatch, use: Use, values: Values) -> UseRows:
    assert use.a is not None
    kind, a = use.options["kind"], values[use.a]
    swapped = use.options.get("swapped", False)
    g = _gradients(use, values)
    if kind == "convolution":
        return convolution_rows(a, g, _window(use, g[0]), ones=use.bias)
    if kind == "linear":
        a = _matrix(a, use, transposed=use.options["a_transposed"])
        g = [_matrix(one, use, transposed=use.options["g_transposed"]) for one in g]
    elif kind == "gathered-experts":
        routed = values[use.operands[0]].flatten()
        a, g = _by_expert(a, routed, use), [_by_expert(one, routed, use) for one in g]
    else:
        assert kind == "embedding", f"no explicit rows for {kind}"
        index = a.reshape(-1).repeat(use.options["repeat"])
        return lookup_rows(index, g, size=match.d_in, padding=use.options["padding_idx"], swapped=swapped)
    return plain_rows(a, g, ones=use.bias, swapped=swapped)


def plain_rows(a: Tensor, g: list[Tensor], *, ones: bool, swapped: bool = False) -> UseRows:
    """Rows that are written out already, [groups, N, T, d] and [groups, N, T, d_out]."""
    return UseRows(
        read=lambda part: a[:, part],
        num=a.shape[1],
        width=a.shape[-1],
        g=tuple(g),
        ones=ones,
        swapped=swapped,
    )


def lookup_rows(index: Tensor, g: list[Tensor], *, size: int, padding: int, swapped: bool = False) -> UseRows:
    """One-hot rows of a table with `size` rows. index: one per row of g [N, ..., d_out]; none for padding."""
    moved = [one.reshape(1, one.shape[0], -1, one.shape[-1]) for one in g]
    places = index.reshape(moved[0].shape[1:3])

    def read(part: slice) -> Tensor:
        hot = places[part].unsqueeze(-1) == torch.arange(size, device=places.device)
        return (hot & (places[part] != padding).unsqueeze(-1)).to(moved[0].dtype).unsqueeze(0)

    return UseRows(read=read, num=len(places), width=size, g=tuple(moved), ones=False, swapped=swapped)


def convolution_rows(x: Tensor, g: list[Tensor], window: Window, *, ones: bool) -> UseRows:
    """Patches of x [N, C, *space] beside g [N, C_out, *outputs]."""
    groups = window.groups
    moved = [one.reshape(len(one), groups, one.shape[1] // groups, -1).permute(1, 0, 3, 2) for one in g]
    taps = torch.Size(window.kernel).numel()
    return UseRows(
        read=lambda part: im2col(x[part], window),
        num=len(x),
        width=x.shape[1] // groups * taps,
        g=tuple(moved),
        ones=ones,
    )


def _window(use: Use, g: Tensor) -> Window:
    geometry = use.geometry
    assert geometry is not None
    return Window(
        kernel=geometry.kernel,
        stride=geometry.stride,
        left=geometry.padding,
        dilation=geometry.dilation,
        outputs=tuple(g.shape[2:]),
        groups=geometry.groups,
        transposed=geometry.transposed,
    )


def _matrix(x: Tensor, use: Use, *, transposed: bool) -> Tensor:
    """An operand of a product of matrices as [groups, N, T, d]."""
    if use.options["vector"] and x.dim() == 1:
        x = x.unsqueeze(-1)
    x = x if x.dim() == 3 else x.unsqueeze(0)
    x = x.mT if transposed else x
    num, positions, batch_first = use.options["split"]
    if batch_first:
        return x.unflatten(1, (num, positions))
    return x.unflatten(1, (positions, num)).transpose(1, 2)


def _by_expert(x: Tensor, routed: Tensor, use: Use) -> Tensor:
    """[experts, N, T, d]: each row at its expert, zero at the others. x: one row per routed token."""
    rows = x.reshape(len(routed), -1)
    found = rows.new_zeros(use.options["experts"], *rows.shape)
    found[routed, torch.arange(len(routed), device=rows.device)] = rows
    num = use.options["examples"] if len(rows) % use.options["examples"] == 0 else len(rows)
    return found.unflatten(1, (num, -1))


def _block_rows(use: Use, values: Values) -> BlockRows:
    kind, rows, channels = use.options["kind"], use.options["rows"], use.options["channels"]
    g = _gradients(use, values)
    if kind != "norm":
        order = use.options["order"]
        moved = [one.permute(order).reshape(rows, -1, channels) for one in g]
        x = None if use.a is None else values[use.a].permute(order).reshape(rows, -1, channels)
        return BlockRows(x=x, g=tuple(moved), ones=use.bias)
    assert use.a is not None
    x = _normalised(values[use.a], [values[node] for node in use.operands], use)
    first = use.options["channels_first"]
    return block_rows_of(x, g, rows=rows, channels=channels, channels_first=first, ones=use.bias)


def block_rows_of(
    x: Tensor, g: list[Tensor], *, rows: int, channels: int, channels_first: bool, ones: bool
) -> BlockRows:
    """Of a normalised input and g of its shape: [N, C, *space] if `channels_first`, else [..., *channels]."""
    if channels_first:
        moved = [one.flatten(2).transpose(1, 2) if one.dim() > 2 else one.unsqueeze(1) for one in (x, *g)]
    else:
        moved = [one.reshape(rows, -1, channels) for one in (x, *g)]
    return BlockRows(x=moved[0], g=tuple(moved[1:]), ones=ones)


def _normalised(x: Tensor, saved: list[Tensor], use: Use) -> Tensor:
    """(x - mean) / deviation from what the norm's forward saved: mean and 1/deviation, or mean and variance
    if `eps` is known.
    """
    mean, inverse = (torch.zeros_like(saved[0]), saved[0]) if len(saved) == 1 else (saved[0], saved[1])
    if use.options["eps"] is not None:
        inverse = 1 / (inverse + use.options["eps"]).sqrt()
    if use.options["channels_first"]:
        per_group = x.shape[1] // mean.shape[-1]  # group norm keeps [N, groups], batch norm [C]
        shape = (-1, x.shape[1], *[1] * (x.dim() - 2))
        mean, inverse = (s.repeat_interleave(per_group, -1).reshape(shape) for s in (mean, inverse))
    return (x - mean) * inverse
