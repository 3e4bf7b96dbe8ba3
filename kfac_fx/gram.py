"""Second moments of rows: what every statistic is made of. Normalisation of methods.md section 1.3, in this
one place.

Rows are `[groups, examples, positions, features]`: examples is N of the batch, positions the axis that shares
the weight (space, tokens), groups one entry per independent product (groups of a convolution, experts).
Tensors in, tensors out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kfac_fx.types import Sharing

_LARGE, _BLOCKS = 512, 4  # 5/8 of the FLOPs in 3/4 of the time (d = 1024 on two CPU cores); no gain below


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


@final
@dataclass(frozen=True, kw_only=True)
class InputMoment:
    """Sums over the rows of one use. moment: of a a^T, [groups, d, d]. total: of a, [groups, d].

    count: number of rows. ones: whether the bias column of ones belongs to the use.
    """

    moment: Tensor
    total: Tensor
    count: Tensor | int
    ones: bool


@final
@dataclass(frozen=True, kw_only=True)
class PositionSums:
    """Sums over the positions of each example of one use: [groups, N, d]. positions: T."""

    sums: Tensor
    positions: int
    ones: bool


def moment_of_rows(use: InputRows) -> InputMoment:
    """From rows that are written out."""
    rows = use.rows
    count: Tensor | int = rows.shape[1] * rows.shape[2]
    if use.kept is not None:
        rows, count = rows * use.kept.to(rows.dtype).unsqueeze(-1), use.kept.sum().clamp(min=1)
    return InputMoment(moment=gram(rows), total=wide(rows).sum((1, 2)), count=count, ones=use.ones)


def sums_of_rows(use: InputRows) -> PositionSums:
    """From rows that are written out."""
    return PositionSums(sums=wide(use.rows).sum(2), positions=use.rows.shape[2], ones=use.ones)


def input_moment(uses: Sequence[InputMoment], *, bias: bool) -> Tensor:
    """A = mean of a a^T over examples and positions (expand). Returns [groups, d(+1), d(+1)].

    bias: append the homogeneous coordinate, 1 for uses with a bias and 0 for those without. Several uses of
    one weight are further positions. Eschenhagen et al. 2023 (arXiv:2311.00636), section 3.
    """
    count = sum((use.count for use in uses[1:]), start=uses[0].count)
    moment = _total([use.moment for use in uses])
    with_ones = [use for use in uses if use.ones]
    if not bias:
        return moment / count
    column = _total([use.total for use in with_ones]).unsqueeze(-1)
    corner = torch.ones_like(column[:, :1]) * sum((u.count for u in with_ones[1:]), start=with_ones[0].count)
    return torch.cat([torch.cat([moment, column], 2), torch.cat([column.mT, corner], 2)], 1) / count


def reduced_rows(uses: Sequence[PositionSums], *, bias: bool) -> Tensor:
    """Rows X with X^T X = A of the reduce setting, a mean over positions each: [groups, N, d(+1)].

    A = mean over examples of the outer product of the position means; arguments as in `input_moment`.
    """
    positions = sum(use.positions for use in uses)
    mean = _total([use.sums for use in uses]) / positions
    if bias:
        share = sum(use.positions for use in uses if use.ones) / positions
        mean = torch.cat([mean, torch.full_like(mean[..., :1], share)], -1)
    return mean * mean.shape[1] ** -0.5


def gram(rows: Tensor) -> Tensor:
    """Sum of row^T row: [groups, N, T, d] or [groups, m, d] -> [groups, d, d].

    Where the positions lie side by side in memory (images of channels), rows are not brought together: few
    features get a product per example, many one product of channels. Rows of half precision are multiplied
    in float32; those of bfloat16 on CUDA as they are (exact products, summed in float32).
    """
    rows = rows if _multiplied_narrow(rows) else wide(rows)
    if rows.dim() == 4 and rows.stride(-2) == 1 and rows.stride(-1) != 1:
        if rows.shape[2] >= 4 * rows.shape[3]:
            return _product(rows.mT, rows).sum(1)
        return _symmetric_product(rows.permute(0, 3, 1, 2).flatten(2).mT)
    flat = rows.flatten(1, -2)
    return _symmetric_product(flat[0]).unsqueeze(0) if flat.shape[0] == 1 else _symmetric_product(flat)


def _symmetric_product(rows: Tensor) -> Tensor:
    """rows^T rows: [..., m, d] -> [..., d, d]. Of large ones blocks of the upper half alone are computed."""
    d = rows.shape[-1]
    if d < _LARGE:
        return _product(rows.mT, rows)
    size = -(-d // _BLOCKS)
    starts = range(0, d, size)
    upper = [_product(rows[..., start : start + size].mT, rows[..., start:]) for start in starts]
    lines = []
    for place, start in enumerate(starts):
        columns = [slice(start - other, start - other + size) for other in starts[:place]]
        mirrored = [upper[i][..., c].mT for i, c in enumerate(columns)]
        lines.append(torch.cat([*mirrored, upper[place]], -1))
    return torch.cat(lines, -2)


def rounded(rows: Tensor) -> Tensor:
    """Rows rounded to bfloat16: of that dtype where `gram` multiplies it, else these values in float32."""
    narrow = rows.to(torch.bfloat16)
    return narrow if _multiplied_narrow(narrow) else narrow.to(torch.float32)


def _multiplied_narrow(rows: Tensor) -> bool:
    """CUDA alone has products of bfloat16 with a result in float32; on CPUs torch rounds the result too."""
    return rows.dtype == torch.bfloat16 and rows.device.type == "cuda"


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix products in float32 or float64: [..., k, m] and [..., m, d] -> [..., k, d]."""
    if right.dtype != torch.bfloat16:
        return left @ right
    if right.dim() == 2:
        return torch.mm(left, right, out_dtype=torch.float32)
    batch = right.shape[:-2]
    flat = torch.bmm(left.flatten(0, -3), right.flatten(0, -3), out_dtype=torch.float32)
    return flat.unflatten(0, batch)


def output_moment(uses: Sequence[Tensor], inverse_scale: Tensor, *, sharing: Sharing) -> Tensor:
    """G = R_ sum g g^T of un-normalised gradients, from gradients of the reduced loss: `inverse_scale * sum g
    g^T`.

    uses: rows of every use in every backward pass, a list per pass flattened; for "reduce" positions are
    summed within one entry, so uses of one pass must be concatenated over positions before. inverse_scale:
    1/R_, 0-dim.
    """
    rows = uses if sharing == "expand" else [wide(use).sum(2, keepdim=True) for use in uses]
    return _total([gram(use) for use in rows]) * inverse_scale


def output_diagonal(uses: Sequence[Tensor], inverse_scale: Tensor) -> Tensor:
    """diag(G) of the expand setting without forming G: [groups * d]."""
    return _total([(wide(use) ** 2).sum((1, 2)).reshape(-1) for use in uses]) * inverse_scale


def block_moment(rows: Sequence[Sequence[Tensor]], inverse_scale: Tensor) -> Tensor:
    """F per channel from per-row products of its k parameters. rows: per use k times [rows, channels].

    Returns [channels, k, k]. The sums of k (k + 1) / 2 products: k is 1 or 2, too few for matrix products.
    """
    return _total([_block_moment([wide(part) for part in parts]) for parts in rows]) * inverse_scale


def _block_moment(parts: Sequence[Tensor]) -> Tensor:
    places = range(len(parts))
    sums = {(i, j): (parts[i] * parts[j]).sum(0) for i in places for j in range(i + 1)}
    return torch.stack([torch.stack([sums[max(i, j), min(i, j)] for j in places], -1) for i in places], -2)


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


def wide(rows: Tensor) -> Tensor:
    """Rows in the precision of factors."""
    return rows.to(statistics_dtype(rows.dtype))


def _total(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
