"""Experts chosen per token: `bmm(weight[ids], x)`, whose gradient is accumulated into the table of expert
weights.

Each routed token is one row of its expert's factors; rows of other experts are zero there. One factor pair
per expert, normalised by all routed tokens, so that an expert that is rarely chosen has small factors as it
has small gradients. Rows that are not the same number for every example cannot be told apart by example: each
then counts as one of its own, which is exact where no example gives an expert two rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor
from torch.fx import Node

from kfac_fx.errors import Reason
from kfac_fx.graph import aten, is_op, shape
from kfac_fx.layers.kind import Facts, Product, bias_key
from kfac_fx.layout import Layout, Permute, View
from kfac_fx.types import Use
from kfac_fx.walk import Term, gradient_terms


@final
@dataclass(frozen=True)
class GatheredExperts:
    """Batched linear layers whose weights are gathered by an index per row."""

    name: str = "gathered-experts"

    def match(self, term: Term, facts: Facts) -> Product | Reason | None:
        """index_put of rank-one products (bmm over one row) into zeros, accumulated along the first
        dimension.
        """
        root = term.root
        if not is_op(root, aten.index_put.default, aten._unsafe_index_put.default) or len(root.args) != 4:
            return None
        zeros, index_list, update, accumulate = root.args
        if not accumulate or len(index_list) != 1 or len(shape(root)) != 3:  # type: ignore[arg-type]
            return None
        if not is_op(zeros, aten.new_zeros.default, aten.zeros.default):
            return None
        assert isinstance(update, Node)
        inner = gradient_terms(update)
        if len(inner) != 1 or not is_op(inner[0].root, aten.bmm.default) or inner[0].scale != 1.0:
            return None
        product, steps = inner[0].root, inner[0].steps
        left, right = product.args[:2]
        assert isinstance(left, Node) and isinstance(right, Node)
        halves = facts.halves(left, right)
        if halves is None or shape(left)[-1] != 1 or not _keeps_matrix(steps):
            return None
        refused = facts.check_input(halves[0])
        if refused is not None:
            return refused
        experts, rows = shape(root)[0], shape(left)[0]
        swapped = halves[0] is left
        if any(isinstance(step, Permute) for step in steps):
            swapped = not swapped
        out_dim, in_dim = (shape(root)[2], shape(root)[1]) if swapped else (shape(root)[1], shape(root)[2])
        return Product(
            kind=self.name,
            structure="kronecker",
            a=halves[0],
            g=halves[1],
            groups=experts,
            d_in=in_dim,
            d_out=out_dim,
            rows=rows,
            steps=(Permute(dims=(0, 2, 1)),) if swapped else (),
            bias_root=bias_key(halves[1]),
            operands=(index_list[0],),  # type: ignore[index,arg-type]
            options={"experts": experts, "examples": facts.examples},
        )

    def input_rows(self, use: Use, a: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
        """[experts, N, T, d_in]; zero where another expert is chosen."""
        rows = a.reshape(a.shape[0], -1)
        experts = use.options["experts"]
        ids = operands[0].reshape(1, -1)
        mask = (ids == ids.new_ones(experts, 1).cumsum(0) - 1).unsqueeze(-1).to(rows.dtype)
        num = use.options["examples"] if rows.shape[0] % use.options["examples"] == 0 else rows.shape[0]
        return (rows.unsqueeze(0) * mask).reshape(experts, num, -1, rows.shape[1])

    def output_rows(self, use: Use, g: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
        """[experts, N, T, d_out]; zero where another expert is chosen."""
        return self.input_rows(use, g, operands)


def _keeps_matrix(steps: tuple[Permute | View, ...]) -> bool:
    """Only a transposition of the two matrix axes, if anything."""
    return len(Layout(steps=steps).steps) <= 1 and all(
        isinstance(step, Permute) and step.dims == (0, 2, 1) for step in steps
    )
