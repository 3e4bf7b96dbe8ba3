"""Parameters that scale or shift an activation: one small block (or one number) per element.

Hand-written norms, layer scale, gates; biases without a layer, class tokens and position tables. The gradient
is a sum over examples of `g * x` (scale) or of `g` (shift); positions of one example are summed first
(methods.md 9.1, 9.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from torch import Tensor
from torch.fx import Node

from kfac_fx.errors import Reason
from kfac_fx.graph import aten, getitem_source, is_op, shape
from kfac_fx.layers.kind import Facts, Product, bias_key
from kfac_fx.layers.norm import norm_shift
from kfac_fx.layout import View
from kfac_fx.types import Use
from kfac_fx.walk import Term, base


@final
@dataclass(frozen=True)
class Scale:
    """`y = scale * x`, broadcast over the batch."""

    name: str = "scale"

    def match(self, term: Term, facts: Facts) -> Product | Reason | None:
        """A sum over the batch of a product of one tensor of each half."""
        summed = _batch_sum(term.root)
        product = base(summed[0]) if summed else base(term.root)
        if summed is None and facts.examples == 1 and shape(product)[:1] == (1,):
            summed = product, (0,)  # one example: autograd sums nothing
        if not is_op(product, aten.mul.Tensor) or not all(isinstance(arg, Node) for arg in product.args[:2]):
            return None
        halves = facts.halves(*product.args[:2])  # type: ignore[arg-type]
        if halves is None:
            return None
        refused = facts.check_input(halves[0])
        if refused is not None:
            return Reason.REPARAMETRISED if summed is None else refused
        if summed is None or shape(summed[0]) != shape(product) or shape(product)[0] % facts.examples:
            return Reason.ELEMENTWISE_SCALE
        if shape(halves[0]) != shape(product) or shape(halves[1]) != shape(product):
            return Reason.ELEMENTWISE_SCALE
        return _product(self.name, term.root, summed, halves[0], halves[1], facts)

    def input_rows(self, use: Use, a: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
        """[rows, positions, channels]."""
        return _rows(a, use)

    def output_rows(self, use: Use, g: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
        """[rows, positions, channels]."""
        return _rows(g, use)


@final
@dataclass(frozen=True)
class Shift:
    """`y = x + shift`, broadcast over the batch; the input is the number one."""

    name: str = "shift"

    def match(self, term: Term, facts: Facts) -> Product | Reason | None:
        """A sum over the batch of an output gradient."""
        fused = _convolution_bias(term.root) or norm_shift(term.root)
        summed = fused or _batch_sum(term.root)
        if summed is None or summed[0] not in facts.capture.backward:
            return None
        if shape(summed[0])[0] % facts.examples:
            return Reason.BROADCAST_ADD
        per_example_product = fused is None and is_op(base(summed[0]), aten.bmm.default, aten.mm.default)
        return _product(
            "diagonal" if per_example_product else self.name, term.root, summed, None, summed[0], facts
        )

    def input_rows(self, use: Use, a: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
        """Not read: a shift has no input."""
        raise AssertionError("a shift has no input")

    def output_rows(self, use: Use, g: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
        """[rows, positions, channels]."""
        return _rows(g, use)


def _convolution_bias(root: Node) -> tuple[Node, tuple[int, ...]] | None:
    """The bias of a convolution whose weight is not matched.

    A sum of its output gradient over batch and space.
    """
    selected = getitem_source(root)
    if selected is None or selected[1] != 2 or not is_op(selected[0], aten.convolution_backward.default):
        return None
    g = selected[0].args[0]
    assert isinstance(g, Node)
    return g, (0, *range(2, len(shape(g))))


def _batch_sum(root: Node) -> tuple[Node, tuple[int, ...]] | None:
    """(summed tensor, dimensions) if the root sums over the leading dimension and perhaps others."""
    if not is_op(root, aten.sum.dim_IntList):
        return None
    source = root.args[0]
    assert isinstance(source, Node)
    dims = tuple(sorted(int(d) % len(shape(source)) for d in root.args[1]))  # type: ignore[union-attr,arg-type]
    return (source, dims) if 0 in dims else None


def _product(
    kind: str, root: Node, summed: tuple[Node, tuple[int, ...]], a: Node | None, g: Node, facts: Facts
) -> Product:
    source, dims = summed
    sizes = shape(source)
    kept = [d for d in range(len(sizes)) if d not in dims]
    channels = math.prod(sizes[d] for d in kept)
    positions = math.prod(sizes[d] for d in dims[1:])
    positions *= sizes[0] // facts.examples  # rows that were flattened before, batch first
    per_term = facts.capture.loss_info.terms > 1 and positions % facts.capture.loss_info.terms == 0
    rows = facts.examples * positions if per_term else facts.examples
    return Product(
        kind=kind,
        structure="block",
        a=a,
        g=g,
        groups=channels,
        d_in=1,
        d_out=1,
        rows=rows,
        steps=() if shape(root) == (channels,) else (View(before=(channels,), after=shape(root)),),
        bias_root=bias_key(g),
        options={
            "order": (*dims, *kept),
            "rows": rows,
            "channels": channels,
        },
    )


def _rows(x: Tensor, use: Use) -> Tensor:
    """Summed dimensions first, then the kept ones: [rows, positions, channels]."""
    moved = x.permute(use.options["order"])
    return moved.reshape(use.options["rows"], -1, use.options["channels"])
