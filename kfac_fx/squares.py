"""Squares of per-example gradients in a basis: corrected eigenvalues (methods.md 6.2), diagonals (9.2).

Enters: rows `[groups, examples, positions, features]` as in `gram`, or what they are made of. Leaves: sums
over examples. Tensors only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from kfac_fx.forms import LARGEST_PATCHES
from kfac_fx.gram import InputRows, statistics_dtype, wide
from kfac_fx.layout import Geometry
from kfac_fx.rows import with_ones
from kfac_fx.windows import patches_by_lines

_LARGEST_PART = 2**24  # elements of a part, whatever the activations have
_MOST_PARTS = 16  # of the examples; more make long programs
_Passes: TypeAlias = Sequence[tuple[InputRows, Tensor]]  # of one use


@final
@dataclass(frozen=True, kw_only=True)
class GradientParts:
    """Rows of one use whose products are the gradients of examples, some at a time.

    read: (examples, parts) -> for parts of the positions, in about so many parts, the input rows and the
    output rows of each backward pass. groups, positions, d_in, d_out: sizes of these rows. elements: of the
    larger of the two tensors that they are made of.
    """

    read: Callable[[slice, int], Iterable[_Passes]]
    groups: int
    positions: int
    d_in: int
    d_out: int
    elements: int


def parts_of_rows(passes: _Passes) -> GradientParts:
    """Of input and output rows that are there already, one pair per backward pass."""

    def read(examples: slice, parts: int) -> Iterator[list[tuple[InputRows, Tensor]]]:
        inputs = {id(use): _of_examples(use, examples) for use, _ in passes}
        yield [(inputs[id(use)], g[:, examples]) for use, g in passes]

    (use, g), *_ = passes
    groups, _, positions, d_in = use.rows.shape
    elements = max(use.rows.numel(), g.numel())
    return GradientParts(
        read=read, groups=groups, positions=positions, d_in=d_in, d_out=g.shape[3], elements=elements
    )


def _of_examples(use: InputRows, examples: slice) -> InputRows:
    kept = None if use.kept is None else use.kept[examples]
    return InputRows(rows=use.rows[:, examples], ones=use.ones, kept=kept)


def parts_of_patches(
    x: Tensor, geometry: Geometry, passes: Sequence[Tensor], *, ones: bool, kept: Tensor | None
) -> GradientParts:
    """Of a convolution's patches. passes: output rows of each backward pass. ones, kept: of `InputRows`."""

    def read(examples: slice, parts: int) -> Iterator[list[tuple[InputRows, Tensor]]]:
        for positions, rows in patches_by_lines(x[examples], geometry, parts):
            marks = None if kept is None else kept[examples, positions]
            use = InputRows(rows=rows, ones=ones, kept=marks)
            yield [(use, g[:, examples, positions]) for g in passes]

    groups, _, positions, d_out = passes[0].shape
    return GradientParts(
        read=read,
        groups=groups,
        positions=positions,
        d_in=x.shape[1] // groups * math.prod(geometry.kernel),
        d_out=d_out,
        elements=max(x.numel(), passes[0].numel()),
    )


def squared_projections(
    uses: Sequence[GradientParts],
    input_basis: Tensor | None,
    output_basis: Tensor | None,
    *,
    bias: bool,
    examples: int,
) -> Tensor:
    """Sum over n and passes of (Q_G^T J_n Q_A)^2, J_n = sum of g a^T of a pass over positions and uses.

    Positions are summed BEFORE the square, so this is the exact diagonal of the Fisher block in that basis
    (George et al. 2018, arXiv:1806.03884, section 3; methods.md 6.2). Returns [groups, d_out, d_in(+1)].
    Examples are taken in parts: rows and gradients of a part are at most `LARGEST_PATCHES` times as large as
    what the layer reads, or those of one example in parts of its positions; gradients may be larger in the
    few parts that programs can have.
    """
    first, positions = uses[0], sum(use.positions for use in uses)
    d_in, d_out = first.d_in + bias, first.d_out
    limit = min(_LARGEST_PART, int(LARGEST_PATCHES * max(use.elements for use in uses)))
    of_rows = first.groups * positions * max(d_in, d_out)
    of_gradient = first.groups * d_in * d_out if positions > 1 else 0
    size = min(limit // of_rows, max(limit // max(of_gradient, 1), -(-examples // _MOST_PARTS)))
    size = min(examples, max(1, size))
    total, parts = None, -(-of_rows // limit)
    for start in range(0, examples, size):
        part = slice(start, min(start + size, examples))
        read = (pairs for use in uses for pairs in use.read(part, parts))
        read = _joined(list(read)) if parts == 1 else read
        rotated = (_rotated_pairs(pairs, input_basis, output_basis, bias=bias) for pairs in read)
        square = _squares(list(rotated)) if parts == 1 else _squares_of_sums(rotated)
        total = square if total is None else total + square
    assert total is not None
    return total


def _joined(uses: Sequence[_Passes]) -> Sequence[_Passes]:
    """All uses as one, the positions of an example side by side; as they are where they are not alike."""
    inputs = [use for pairs in uses for use, _ in pairs]
    alike = all(use.ones == inputs[0].ones and use.kept is None for use in inputs)
    if len(uses) == 1 or len(uses[0]) > 1 or not alike:
        return uses
    rows = torch.cat([use.rows for use in inputs], 2)
    outputs = torch.cat([wide(g) for ((_, g),) in uses], 2)
    return [[(InputRows(rows=rows, ones=inputs[0].ones), outputs)]]


def _rotated_pairs(
    passes: _Passes,
    input_basis: Tensor | None,
    output_basis: Tensor | None,
    *,
    bias: bool,
) -> list[tuple[Tensor, Tensor]]:
    """Input and output rows of each pass in the bases; input rows of several passes once."""
    uses = {id(use): use for use, _ in passes}
    inputs = {key: _rotated(with_ones(use, bias=bias), input_basis) for key, use in uses.items()}
    return [(inputs[id(use)], _rotated(wide(g), output_basis)) for use, g in passes]


def _squares(uses: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> Tensor:
    """Sum over examples and passes of squared gradients, from all positions of the examples side by side."""
    total = None
    for pairs in zip(*uses, strict=True):
        a, g = (rows[0] if len(rows) == 1 else torch.cat(rows, 2) for rows in zip(*pairs, strict=True))
        if a.shape[2] == 1:  # one position: the square of an outer product
            square = (g.squeeze(2) ** 2).mT @ (a.squeeze(2) ** 2)
        else:
            square = ((g.mT @ a) ** 2).sum(1)
        total = square if total is None else total + square
    assert total is not None
    return total


def _squares_of_sums(parts: Iterable[Sequence[tuple[Tensor, Tensor]]]) -> Tensor:
    """The same of one example, from some positions at a time."""
    gradients: list[Tensor] = []
    for pairs in parts:
        products = [g.mT @ a for a, g in pairs]
        sums = zip(gradients, products, strict=True)
        gradients = [old + new for old, new in sums] if gradients else products
    return functools.reduce(torch.add, ((gradient**2).sum(1) for gradient in gradients))


def squared_projections_of_indices(
    uses: Sequence[tuple[Tensor, Tensor]], output_basis: Tensor | None, *, size: int, padding_idx: int
) -> Tensor:
    """The same for one-hot inputs: [1, d_out, size], without a dense gradient per example.

    uses: indices, one per row, and rows [1, N, T, d_out] of each use. Positions of one example with the same
    index are summed before the square: (sum y)^2 = sum y_t (sum of y over positions with the index of t).
    """
    indices = [index.reshape(rows.shape[1:3]) for index, rows in uses]
    examples, d_out = uses[0][1].shape[1], uses[0][1].shape[3]
    positions, first = sum(index.shape[1] for index in indices), uses[0][1]
    limit = int(LARGEST_PATCHES * max(rows.numel() for _, rows in uses))  # of rows, of tables of [T, T]
    num = min(examples, max(1, limit // (positions * max(positions, d_out))))
    table = torch.zeros(size, d_out, dtype=statistics_dtype(first.dtype), device=first.device)
    for start in range(0, examples, num):
        part = slice(start, start + num)
        y = torch.cat([wide(rows[0, part]) for _, rows in uses], 1)
        y = y if output_basis is None else y @ output_basis.to(y.dtype)
        index = torch.cat([one[part] for one in indices], 1)
        same = (index.unsqueeze(2) == index.unsqueeze(1)).to(y.dtype)
        kept = (index != padding_idx).to(y.dtype).unsqueeze(-1)
        products = (y * (same @ y) * kept).flatten(0, 1)
        table = table.index_add(0, index.reshape(-1), products)
    return table.mT.unsqueeze(0)


def _rotated(rows: Tensor, basis: Tensor | None) -> Tensor:
    if basis is None:
        return rows
    basis = basis.to(rows.dtype)
    if rows.shape[0] == 1:
        return rows @ basis.unsqueeze(1)
    return (rows.flatten(1, 2) @ basis).unflatten(1, rows.shape[1:3])  # one basis per group, not per example
