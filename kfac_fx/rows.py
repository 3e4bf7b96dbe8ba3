"""Rows whose Gram matrix is a factor.

What methods read that keep no second moments: thin factors (methods.md 4.1, 4.4), channel moments (3.3).
Rows are `[groups, examples, positions, features]` as in `gram`. Tensors in, tensors out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_fx.gram import InputRows, gram, wide
from kfac_fx.layout import Geometry
from kfac_fx.windows import positions_of, upsampled, window_sums

_BITS = 2**31 - 1


def input_rows(uses: Sequence[InputRows], *, bias: bool) -> Tensor:
    """X with X^T X = A of `gram.input_moment`: [groups, m, d(+1)], m = N T summed over the uses."""
    totals = [use.rows.shape[2] for use in uses]
    count = total_count([(use.rows.shape[1] * use.rows.shape[2], use.kept) for use in uses])
    return weighted_rows(uses, totals, count, bias=bias)


def weighted_rows(
    uses: Sequence[InputRows], totals: Sequence[int], count: Tensor | int, *, bias: bool
) -> Tensor:
    """Rows of some positions that stand for all: [groups, m, d(+1)].

    Their weight is that of as many examples, so that the average over all choices of positions is A. totals:
    T of each use. count: `total_count` of all rows.
    """
    extended = [
        with_ones(use, bias=bias) * (total / use.rows.shape[2]) ** 0.5
        if total != use.rows.shape[2]
        else with_ones(use, bias=bias)
        for use, total in zip(uses, totals, strict=True)
    ]
    return torch.cat([rows.flatten(1, 2) for rows in extended], 1) * count**-0.5


def total_count(uses: Sequence[tuple[int, Tensor | None]]) -> Tensor | int:
    """How many rows count. uses: number of rows and marks `kept` of each."""
    counts = [num if kept is None else kept.sum().clamp(min=1) for num, kept in uses]
    return sum(counts[1:], start=counts[0])


def at_positions(use: InputRows, index: Tensor) -> InputRows:
    """The rows at some positions alone."""
    kept = None if use.kept is None else use.kept.index_select(1, index)
    return InputRows(rows=use.rows.index_select(2, index), ones=use.ones, kept=kept)


def output_rows(
    uses: Sequence[Tensor],
    inverse_scale: Tensor,
    *,
    reduced: bool,
    positions: Sequence[Tensor] | None = None,
) -> Tensor:
    """X with X^T X = G of `gram.output_moment`: [groups, m, d_out]; arguments as there and in `input_rows`.

    positions: one index tensor per entry of `uses`.
    """
    rows = [wide(use) for use in uses]
    if reduced:
        flat = torch.cat([use.sum(2) for use in rows], 1)
    elif positions is None:
        flat = torch.cat([use.flatten(1, 2) for use in rows], 1)
    else:
        pairs = zip(rows, positions, strict=True)
        chosen = [use.index_select(2, index) * (use.shape[2] / index.shape[0]) ** 0.5 for use, index in pairs]
        flat = torch.cat([use.flatten(1, 2) for use in chosen], 1)
    return flat * inverse_scale.to(flat.dtype).sqrt()


def with_ones(use: InputRows, *, bias: bool) -> Tensor:
    """Input rows in the precision of factors, with the bias' column, zero where they do not count."""
    rows = wide(use.rows)
    if bias:
        rows = torch.cat([rows, torch.full_like(rows[..., :1], float(use.ones))], -1)
    return rows if use.kept is None else rows * use.kept.to(rows.dtype).unsqueeze(-1)


def channel_moments(x: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Mean [groups, C] and second moment [groups, C, C] over examples and pixels of [N, groups * C, *space].

    Grosse & Martens 2016 (arXiv:1602.01407), section 3 and appendix, spatially uncorrelated activations.
    Zeros that the kernel reads count: padded pixels and, for a transposed convolution, those between pixels.
    """
    pixels = [size + 2 * p for size, p in zip(x.shape[2:], geometry.padding, strict=True)]
    if geometry.transposed:
        reach = [d * (k - 1) for d, k in zip(geometry.dilation, geometry.kernel, strict=True)]
        if any(p > r for p, r in zip(geometry.padding, reach, strict=True)):
            x = upsampled(x, geometry)[0]  # without the pixels that no output reads
            pixels = list(x.shape[2:])
        else:  # zeros are counted, not written
            outputs = positions_of(geometry, tuple(x.shape[2:]))
            pixels = [size + r for size, r in zip(outputs, reach, strict=True)]
    rows = wide(x).flatten(2).unflatten(1, (geometry.groups, -1)).permute(1, 0, 3, 2)
    count = x.shape[0] * math.prod(pixels)
    return rows.sum((1, 2)) / count, gram(rows) / count


def kernel_sums(rows: Tensor, volume: int) -> Tensor:
    """Patches summed over the kernel's `volume` positions: [..., C * volume] -> [..., C]."""
    return rows.unflatten(-1, (-1, volume)).sum(-1)


def field_rows(
    uses: Sequence[tuple[Tensor, Geometry, bool, Tensor | None]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Patches summed over the kernel, never written: rows [groups, m, C], and of all columns of A the trace
    without the bias', and the bias' own entry, [groups] each.

    uses: image, geometry, whether the bias belongs to it, marks `kept` [N, T]. Normalised as `input_rows`.
    """
    rows, traces, counts = [], [], []
    for x, geometry, _, kept in uses:
        by_group = wide(x).unflatten(1, (geometry.groups, -1))
        sums = window_sums(by_group.flatten(1, 2), geometry).unflatten(1, by_group.shape[1:3])
        sums, squares = sums.permute(1, 0, 3, 2), window_sums((by_group**2).sum(2), geometry)
        if kept is not None:
            marks = kept.to(sums.dtype)
            sums, squares = sums * marks.unsqueeze(-1), squares * marks.unsqueeze(1)
        rows.append(sums.flatten(1, 2))
        traces.append(squares.sum((0, 2)))
        counts.append(total_count([(sums.shape[1] * sums.shape[2], kept)]))
    total = sum(counts[1:], start=counts[0])
    with_bias = sum(count for count, (*_, ones, _) in zip(counts, uses, strict=True) if ones)
    trace = sum(traces[1:], start=traces[0]) / total
    return torch.cat(rows, 1) * total**-0.5, trace, torch.ones_like(trace) * with_bias / total


def reduced_field_rows(rows: Tensor, *, volume: int, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same of rows that are means over positions: [groups, N, C * volume (+1)]."""
    patches = rows[..., :-1] if bias else rows
    return kernel_sums(patches, volume), (patches**2).sum((1, 2)), (rows[..., -1] ** 2).sum(1)


def drawn_positions(draws: Tensor, *, seed: int, num: int, count: int) -> Tensor:
    """`count` of `num` positions without replacement, in an order decided by (draws, seed) alone: [count].

    draws: 0-dim int64, how many draws came before. The positions are sorted by a hash that maps different
    positions to different numbers, so that no generator is needed and runs repeat on every device.
    """
    places = torch.arange(num, device=draws.device)
    if count >= num:
        return places
    start = _mixed((draws & _BITS) ^ _mixed(seed & _BITS))
    return torch.argsort(_mixed(start ^ _mixed(places)))[:count]


def _mixed(number: Any) -> Any:
    """A one-to-one map of 31-bit integers that spreads their bits; products stay below 2^62."""
    for shift, factor in ((16, 1_640_531_527), (13, 1_103_515_245), (15, 1_812_433_253)):
        number = ((number ^ (number >> shift)) * factor) & _BITS
    return number ^ (number >> 16)
