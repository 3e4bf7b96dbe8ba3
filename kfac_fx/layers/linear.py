"""Linear layers in every spelling: the gradient is a product of two matrices, one made in the forward half.

`nn.Linear`, `F.linear`, `x @ W`, `x @ W.T`, einsum and Hugging Face's `Conv1D` all end in `mm`; experts and
per-head weights in `bmm` (one factor pair per batch entry); a weight vector in `mv`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from torch import Tensor
from torch.fx import Node

from kfac_fx.errors import Reason
from kfac_fx.graph import aten, is_op, shape
from kfac_fx.layers.kind import Facts, Product, bias_key
from kfac_fx.layout import Permute, View
from kfac_fx.types import Use
from kfac_fx.walk import Term, base_value, structural_step


@final
@dataclass(frozen=True)
class Linear:
    """`y = x W^T (+ b)` for any rank of `x`."""

    name: str = "linear"

    def match(self, term: Term, facts: Facts) -> Product | Reason | None:
        """mm, bmm or mv with one operand of each half."""
        root = term.root
        if not is_op(root, aten.mm.default, aten.bmm.default, aten.mv.default):
            return None
        left, right = root.args[:2]
        assert isinstance(left, Node) and isinstance(right, Node)
        halves = facts.halves(left, right)
        if halves is None:
            return None
        refused = facts.check_input(halves[0])
        constant = refused is Reason.BATCH_FREE and shape(left)[-1] % facts.examples == 0
        if refused is not None and not constant:
            return refused
        input_left = halves[0] is left
        groups = shape(root)[0] if root.target is aten.bmm.default else 1
        left_matrix, left_transposed = _rows_of_left(left)
        a, g = (left_matrix, right) if input_left else (right, left_matrix)
        d_left = shape(left)[-2]
        d_right = 1 if root.target is aten.mv.default else shape(right)[-1]
        d_in, d_out = (d_left, d_right) if input_left else (d_right, d_left)
        rows = shape(left)[-1]
        return Product(
            kind="linear" if groups == 1 else "batched-linear",
            structure="kronecker",
            a=a,
            g=g,
            groups=groups,
            d_in=d_in,
            d_out=d_out,
            rows=rows,
            steps=_layout(groups, d_in, d_out, input_left, shape(root)),
            bias_root=bias_key(g),
            options={
                "a_transposed": left_transposed and input_left,
                "g_transposed": left_transposed and not input_left,
                "split": _split_rows(
                    a if not (left_transposed and input_left) else None, rows, facts.examples
                ),
                "vector": root.target is aten.mv.default,
            },
            constant_input=constant,
        )

    def input_rows(self, use: Use, a: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
        """[groups, N, T, d_in]."""
        vector = use.options["vector"] and a.dim() == 1
        return _rows(a.unsqueeze(-1) if vector else a, use.options["a_transposed"], use.options["split"])

    def output_rows(self, use: Use, g: Tensor, operands: tuple[Tensor, ...]) -> Tensor:
        """[groups, N, T, d_out]."""
        vector = use.options["vector"] and g.dim() == 1
        return _rows(g.unsqueeze(-1) if vector else g, use.options["g_transposed"], use.options["split"])


def _rows_of_left(left: Node) -> tuple[Node, bool]:
    """The left operand is a transposed matrix of rows.

    (matrix of rows, False), or (left, True) to transpose it.
    """
    moved, rank = structural_step(left), len(shape(left))
    swap = Permute(dims=(*range(rank - 2), rank - 1, rank - 2))
    if moved is not None and moved[1] == swap:
        return moved[0], False
    return left, True


def _layout(
    groups: int, d_in: int, d_out: int, input_left: bool, root: tuple[int, ...]
) -> tuple[Permute | View, ...]:
    steps: list[Permute | View] = []
    matrix = (groups, d_out, d_in)
    if input_left:
        steps.append(Permute(dims=(0, 2, 1)))
        matrix = (groups, d_in, d_out)
    if matrix != root:
        steps.append(View(before=matrix, after=root))
    return tuple(steps)


def _split_rows(a: Node | None, rows: int, examples: int) -> tuple[int, int, bool]:
    """(N, T, batch_first) of the row axis. N is 1 when the rows are not whole examples."""
    if rows % examples:
        return 1, rows, True
    positions = rows // examples
    if a is not None and _batch_position(a, rows, examples) > 0:
        return examples, positions, False
    return examples, positions, True


def _batch_position(a: Node, rows: int, examples: int) -> int:
    """Which of the leading dimensions behind the flattened rows is the batch."""
    source, steps = base_value(a)
    while steps and isinstance(steps[-1], View):
        before = steps[-1].before
        if math.prod(before[:-1]) == rows and before[-1] == shape(a)[-1]:
            moved = [s for s in steps[:-1] if isinstance(s, Permute)]
            dim = _first(shape(source), examples)
            for permute in moved:
                if len(permute.dims) == len(before):
                    dim = permute.dims.index(dim)
            return dim if before[dim] == examples else _first(before, examples)
        steps = steps[:-1]
    return 0


def _first(sizes: tuple[int, ...], examples: int) -> int:
    return next((i for i, size in enumerate(sizes[:-1]) if size == examples), 0)


def _rows(matrix: Tensor, transposed: bool, split: tuple[int, int, bool]) -> Tensor:
    """[(groups,) rows, d] -> [groups, N, T, d]."""
    if matrix.dim() == 2:
        matrix = matrix.unsqueeze(0)
    if transposed:
        matrix = matrix.mT
    num, positions, batch_first = split
    if batch_first:
        return matrix.reshape(matrix.shape[0], num, positions, matrix.shape[-1])
    return matrix.reshape(matrix.shape[0], positions, num, matrix.shape[-1]).transpose(1, 2)
