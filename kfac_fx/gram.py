"""Second moments of rows: what every statistic is made of. Normalisation of methods.md section 1.3, in this
one place.

Rows are `[groups, examples, positions, features]`: examples is N of the batch, positions the axis that shares
the weight (space, tokens), groups one entry per independent product (groups of a convolution, experts).
Tensors in, tensors out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_fx.layout import Geometry
from kfac_fx.types import Sharing


@final
@dataclass(frozen=True, kw_only=True)
class InputRows:
    """Inputs of one use.

    ones: whether the bias column of ones belongs to it. rows: [groups, N, T, d]. kept: [N, T], 1 for rows
    that count and 0 for rows to leave out, or None for all.
    """

    rows: Tensor
    ones: bool
    kept: Tensor | None = None


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Factors are kept in float32, or float64 for float64 models; never in half precision (pitfall P22)."""
    return torch.promote_types(dtype, torch.float32)


def input_moment(uses: Sequence[InputRows], *, sharing: Sharing, bias: bool) -> Tensor:
    """A = mean of a a^T over examples and positions (expand) or of the position mean over examples (reduce).

    bias: append the homogeneous coordinate, 1 for uses with a bias and 0 for those without. Several uses of
    one weight are further positions. Returns [groups, d(+1), d(+1)]. Eschenhagen et al. 2023
    (arXiv:2311.00636), section 3.
    """
    if sharing == "reduce":
        positions = sum(use.rows.shape[2] for use in uses)
        mean = _total([_wide(use.rows).sum(2, keepdim=True) for use in uses]) / positions
        share = sum(use.rows.shape[2] for use in uses if use.ones) / positions
        return _moment(mean, bias=share if bias else None) / mean.shape[1]
    counts = [_count(use) for use in uses]
    moments = [_input_moment(use, count, bias=bias) for use, count in zip(uses, counts, strict=True)]
    return _total(moments) / sum(counts[1:], start=counts[0])


def _count(use: InputRows) -> Tensor | int:
    if use.kept is None:
        return use.rows.shape[1] * use.rows.shape[2]
    return use.kept.sum().clamp(min=1)


def _input_moment(use: InputRows, count: Tensor | int, *, bias: bool) -> Tensor:
    rows = _wide(use.rows)
    if use.kept is not None:
        rows = rows * use.kept.to(rows.dtype).unsqueeze(-1)
    return _moment(rows, bias=float(use.ones) if bias else None, count=count)


def output_moment(uses: Sequence[Tensor], inverse_scale: Tensor, *, sharing: Sharing) -> Tensor:
    """G = R_ sum g g^T of un-normalised gradients, from gradients of the reduced loss: `inverse_scale * sum g
    g^T`.

    uses: rows of every use in every backward pass, a list per pass flattened; for "reduce" positions are
    summed within one entry, so uses of one pass must be concatenated over positions before. inverse_scale:
    1/R_, 0-dim.
    """
    rows = [_wide(use) for use in uses]
    if sharing == "reduce":
        rows = [use.sum(2, keepdim=True) for use in rows]
    return _total([_moment(use, bias=None) for use in rows]) * inverse_scale


def output_diagonal(uses: Sequence[Tensor], inverse_scale: Tensor) -> Tensor:
    """diag(G) of the expand setting without forming G: [groups * d]."""
    return _total([(_wide(use) ** 2).sum((1, 2)).reshape(-1) for use in uses]) * inverse_scale


def block_moment(rows: Sequence[Tensor], inverse_scale: Tensor) -> Tensor:
    """F per channel from per-row products. rows: [rows, channels, k] each. Returns [channels, k, k]."""
    stacked = [_wide(row).permute(1, 0, 2) for row in rows]
    return _total([row.mT @ row for row in stacked]) * inverse_scale


def frequencies(indices: Sequence[Tensor], *, size: int, padding_idx: int, dtype: torch.dtype) -> Tensor:
    """Diagonal of A for one-hot inputs: how often each index occurs, over all positions. Returns [size].

    methods.md 9.3; the padding index counts as a zero vector.
    """
    total = sum(index.numel() for index in indices)
    counts = indices[0].new_zeros(size, dtype=dtype)
    for index in indices:
        flat = index.reshape(-1)
        counts = counts.index_add(0, flat, (flat != padding_idx).to(dtype))
    return counts / total


def patches(x: Tensor, geometry: Geometry) -> Tensor:
    """Patches that a convolution reads, as rows. x: [N, C, *space]. Returns [groups, N, T, C/groups * K].

    Features run channel first, then the kernel in row-major order: the order of `weight.reshape(C_out, -1)`.
    methods.md 1.4.
    """
    if geometry.transposed:
        x, geometry = upsampled(x, geometry)
    x = F.pad(x, [side for p in reversed(geometry.padding) for side in (p, p)])
    return _patches_of_padded(x, geometry)


def _patches_of_padded(x: Tensor, geometry: Geometry) -> Tensor:
    space = len(geometry.kernel)
    for axis in range(space):
        kernel, dilation = geometry.kernel[axis], geometry.dilation[axis]
        x = x.unfold(2 + axis, dilation * (kernel - 1) + 1, geometry.stride[axis])
    index = (..., *(slice(None, None, d) for d in geometry.dilation))
    x = x[index]  # [N, C, *T, *K]
    if geometry.transposed:
        x = x.flip(tuple(range(-space, 0)))
    groups, volume = geometry.groups, math.prod(geometry.kernel)
    num, channels, positions = x.shape[0], x.shape[1] // groups, math.prod(x.shape[2 : 2 + space])
    x = x.unflatten(1, (groups, channels))  # a view still: the one copy is the last reshape
    t, k = range(3, 3 + space), range(3 + space, 3 + 2 * space)
    return x.permute(1, 0, *t, 2, *k).reshape(groups, num, positions, channels * volume)


def upsampled(x: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
    """A transposed convolution reads `x` with zeros between its entries through the mirrored kernel, with
    stride 1.
    """
    space = len(geometry.kernel)
    wide = x
    for axis, stride in enumerate(geometry.stride, start=2):
        spread = wide.unsqueeze(axis + 1)
        zeros = torch.zeros_like(spread).repeat_interleave(stride - 1, axis + 1)
        between = torch.cat([spread, zeros], axis + 1).flatten(axis, axis + 1)
        wide = between.narrow(axis, 0, between.shape[axis] - stride + 1)
    sides: list[int] = []
    for axis in reversed(range(space)):
        left = geometry.dilation[axis] * (geometry.kernel[axis] - 1) - geometry.padding[axis]
        sides += [left, left + geometry.output_padding[axis]]
    padded = F.pad(wide, sides)
    return padded, Geometry(
        kernel=geometry.kernel,
        stride=(1,) * space,
        padding=(0,) * space,
        dilation=geometry.dilation,
        groups=geometry.groups,
        transposed=True,
    )


def _wide(rows: Tensor) -> Tensor:
    return rows.to(statistics_dtype(rows.dtype))


def _total(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _moment(rows: Tensor, *, bias: float | None, count: Tensor | int | None = None) -> Tensor:
    """Sum of row^T row: [groups, N, T, d] -> [groups, d(+1), d(+1)].

    bias: the value of the extra coordinate. count: in how many rows it stands (None: in all).
    """
    flat = rows.reshape(rows.shape[0], -1, rows.shape[-1])
    gram = (flat[0].mT @ flat[0]).unsqueeze(0) if flat.shape[0] == 1 else flat.mT @ flat
    if bias is None:
        return gram
    column = flat.sum(1).unsqueeze(-1)
    column = column if bias == 1.0 else column * bias
    corner = torch.ones_like(column[:, :1]) * (flat.shape[1] if count is None else count) * (bias * bias)
    return torch.cat([torch.cat([gram, column], 2), torch.cat([column.mT, corner], 2)], 1)


def gram(rows: Tensor) -> Tensor:
    """Sum of row^T row: [groups, ..., d] -> [groups, d, d]."""
    return _moment(rows, bias=None)
