"""Convolutions of one to three dimensions, plain and transposed: output 1 of `convolution_backward`.

Stride, padding and dilation are read from the operator; 'same' and non-zero padding modes pad the input
before it, so `a` is what the convolution truly read. Groups get one factor pair each (methods.md 1.4). A
transposed convolution is a convolution of the input with zeros put between its entries, by the mirrored
kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from torch import Tensor
from torch.fx import Node

from kfac_fx.errors import Reason
from kfac_fx.forms import choose
from kfac_fx.graph import aten, getitem_source, is_op, shape, value
from kfac_fx.layers.kind import Facts, Product
from kfac_fx.layout import Geometry, Permute, View
from kfac_fx.types import Use
from kfac_fx.walk import Term
from kfac_fx.windows import patches


@final
@dataclass(frozen=True)
class Convolution:
    """Conv1d, Conv2d, Conv3d and their transposed forms."""

    name: str = "convolution"

    def match(self, term: Term, facts: Facts) -> Product | Reason | None:
        """The weight output of convolution_backward."""
        selected = getitem_source(term.root)
        if selected is None or selected[1] != 1 or not is_op(selected[0], aten.convolution_backward.default):
            return None
        node = selected[0]
        g, a, weight = node.args[:3]
        assert isinstance(g, Node) and isinstance(a, Node) and isinstance(weight, Node)
        if facts.halves(a, g) != (a, g):
            return None
        refused = facts.check_input(a)
        if refused is not None:
            return refused
        stride, padding, dilation, transposed, output_padding, groups = node.args[4:10]
        kernel = shape(weight)[2:]
        rank = len(kernel)
        geometry = Geometry(
            kernel=kernel,
            stride=_per_axis(stride, rank),
            padding=_per_axis(padding, rank),
            dilation=_per_axis(dilation, rank),
            groups=int(groups),  # type: ignore[arg-type]
            transposed=bool(transposed),
            output_padding=_per_axis(output_padding, rank),
            space=tuple(shape(a)[2:]),
        )
        channels_in, channels_out = shape(a)[1] // geometry.groups, shape(g)[1] // geometry.groups
        d_in = channels_in * math.prod(kernel)
        num, positions = shape(g)[0], math.prod(shape(g)[2:])
        cost = choose(geometry, examples=num, channels=shape(a)[1], device=value(a).device.type)
        suffix = f"{rank}d"
        return Product(
            kind=("conv-transpose" if transposed else "conv") + suffix,
            structure="kronecker",
            a=a,
            g=g,
            groups=geometry.groups,
            d_in=d_in,
            d_out=channels_out,
            rows=num * positions,
            steps=_layout(geometry, channels_in, channels_out, shape(weight)),
            bias_root=(node, 2),
            geometry=geometry,
            options={"form": cost.form, "estimated_ns": round(cost.time)},
        )

    def input_rows(self, use: Use, a: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
        """[groups, N, T, C_in/groups * K]."""
        assert use.geometry is not None
        return patches(a, use.geometry)

    def output_rows(self, use: Use, g: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
        """[groups, N, T, C_out/groups]."""
        assert use.geometry is not None
        num, channels, groups = g.shape[0], g.shape[1], use.geometry.groups
        return g.reshape(num, groups, channels // groups, -1).permute(1, 0, 3, 2)


def _per_axis(values: object, rank: int) -> tuple[int, ...]:
    sizes = tuple(int(v) for v in values)  # type: ignore[attr-defined]
    return sizes * rank if len(sizes) == 1 else sizes


def _layout(
    geometry: Geometry, channels_in: int, channels_out: int, weight: tuple[int, ...]
) -> tuple[Permute | View, ...]:
    volume = math.prod(geometry.kernel)
    matrix = (geometry.groups, channels_out, channels_in * volume)
    if not geometry.transposed:
        return (View(before=matrix, after=weight),)
    split = (geometry.groups, channels_out, channels_in, volume)
    moved = (geometry.groups, channels_in, channels_out, volume)
    return (View(before=matrix, after=split), Permute(dims=(0, 2, 1, 3)), View(before=moved, after=weight))
