"""Embeddings: a linear layer on one-hot rows. A is diagonal and kept as a vector, never V x V (methods.md
9.3).

`nn.Embedding`, `F.embedding` and `table[indices]`. An embedding that is the same for every example
(positions) is summed over the batch by autograd before it arrives; the gradient is read in front of that sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor
from torch.fx import Node

from kfac_fx.errors import Reason
from kfac_fx.graph import aten, is_op, shape
from kfac_fx.layers.kind import Facts, Product, bias_key
from kfac_fx.layout import Permute, View
from kfac_fx.types import Use
from kfac_fx.walk import Term, base


@final
@dataclass(frozen=True)
class Embedding:
    """Rows of a table chosen by integer indices."""

    name: str = "embedding"

    def match(self, term: Term, facts: Facts) -> Product | Reason | None:
        """embedding_dense_backward, or index_put that accumulates into zeros along the first dimension."""
        root, padding_idx = term.root, -1
        if is_op(root, aten.embedding_dense_backward.default):
            g, indices, _, padding, by_frequency = root.args
            padding_idx = int(padding)  # type: ignore[arg-type]
            if by_frequency:
                return Reason.EMBEDDING
        elif is_op(root, aten.index_put.default, aten._unsafe_index_put.default) and len(root.args) == 4:
            zeros, index_list, g, accumulate = root.args
            if not (accumulate and is_op(zeros, aten.new_zeros.default, aten.zeros.default)):
                return None
            if len(index_list) != 1 or len(shape(root)) != 2:  # type: ignore[arg-type]
                return None
            indices = index_list[0]  # type: ignore[index]
        else:
            return None
        assert isinstance(g, Node) and isinstance(indices, Node)
        if g not in facts.capture.backward or indices in facts.capture.backward:
            return None
        size, width = shape(root)
        g = _before_batch_sum(g, facts.examples)
        rows = 1
        for length in shape(g)[:-1]:
            rows *= length
        if indices not in facts.capture.data and (shape(g)[0] != facts.examples or len(shape(g)) < 3):
            return Reason.BATCH_FREE
        return Product(
            kind=self.name,
            structure="diagonal",
            a=indices,
            g=g,
            groups=1,
            d_in=size,
            d_out=width,
            rows=rows,
            steps=(Permute(dims=(0, 2, 1)), View(before=(1, size, width), after=(size, width))),
            bias_root=bias_key(g),
            options={"padding_idx": padding_idx, "repeat": rows // max(_numel(indices), 1)},
        )

    def input_rows(self, use: Use, a: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
        """Indices, one per row of `g`: [rows]."""
        return a.reshape(-1).repeat(use.options["repeat"])

    def output_rows(self, use: Use, g: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
        """[1, N, T, width]; N is the leading dimension."""
        return g.reshape(1, g.shape[0], -1, g.shape[-1])


def _numel(node: Node) -> int:
    total = 1
    for size in shape(node):
        total *= size
    return total


def _before_batch_sum(g: Node, examples: int) -> Node:
    """Behind views and a sum over the leading dimension alone: the gradient with one entry per example."""
    node = base(g)
    if is_op(node, aten.sum.dim_IntList) and list(node.args[1]) == [0]:  # type: ignore[arg-type]
        source = node.args[0]
        assert isinstance(source, Node)
        if shape(source)[0] == examples and len(shape(source)) == len(shape(g)):
            return source
        if shape(source)[0] == examples and shape(source)[1:] == shape(g):
            return source
    return g
