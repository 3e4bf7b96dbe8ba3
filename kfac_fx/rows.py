"""Rows whose Gram matrix is a factor, and squares of per-example gradients in a basis.

What methods read that keep no second moments: thin factors (methods.md 4.1, 4.4), corrected eigenvalues
(6.2), channel moments (3.3). Rows are `[groups, examples, positions, features]` as in `gram`. Tensors in,
tensors out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_fx.gram import InputRows, statistics_dtype, upsampled
from kfac_fx.layout import Geometry

_LARGEST_CHUNK = 2**24
_BITS = 2**31 - 1


def input_rows(uses: Sequence[InputRows], *, bias: bool, positions: Sequence[Tensor] | None = None) -> Tensor:
    """X with X^T X = A of `gram.input_moment`: [groups, m, d(+1)], m = N T summed over the uses.

    With `positions` (one index tensor per use) only those positions are kept and the weight is that of as
    many examples, so that the average over all choices of positions is A.
    """
    scale = sum((_count(use) for use in uses[1:]), start=_count(uses[0])) ** -0.5
    if positions is not None:
        shares = [use.rows.shape[2] / index.shape[0] for use, index in zip(uses, positions, strict=True)]
        uses = [_at(use, index) for use, index in zip(uses, positions, strict=True)]
        extended = [_with_ones(use, bias=bias) * n**0.5 for use, n in zip(uses, shares, strict=True)]
    else:
        extended = [_with_ones(use, bias=bias) for use in uses]
    return torch.cat([rows.flatten(1, 2) for rows in extended], 1) * scale


def _at(use: InputRows, index: Tensor) -> InputRows:
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
    rows = [_wide(use) for use in uses]
    if reduced:
        flat = torch.cat([use.sum(2) for use in rows], 1)
    elif positions is None:
        flat = torch.cat([use.flatten(1, 2) for use in rows], 1)
    else:
        pairs = zip(rows, positions, strict=True)
        chosen = [use.index_select(2, index) * (use.shape[2] / index.shape[0]) ** 0.5 for use, index in pairs]
        flat = torch.cat([use.flatten(1, 2) for use in chosen], 1)
    return flat * inverse_scale.to(flat.dtype).sqrt()


def _with_ones(use: InputRows, *, bias: bool) -> Tensor:
    rows = _wide(use.rows)
    if bias:
        rows = torch.cat([rows, torch.full_like(rows[..., :1], float(use.ones))], -1)
    return rows if use.kept is None else rows * use.kept.to(rows.dtype).unsqueeze(-1)


def _count(use: InputRows) -> Tensor | int:
    if use.kept is None:
        return use.rows.shape[1] * use.rows.shape[2]
    return use.kept.sum().clamp(min=1)


def squared_projections(
    uses: Sequence[tuple[InputRows, Tensor]],
    input_basis: Tensor | None,
    output_basis: Tensor | None,
    *,
    bias: bool,
) -> Tensor:
    """Sum over n of (Q_G^T J_n Q_A)^2 of one backward pass, J_n = sum of g a^T over positions and uses.

    uses: input rows and output rows of each use. Positions are summed BEFORE the square, so this is the exact
    diagonal of the Fisher block in that basis (George et al. 2018, arXiv:1806.03884, section 3; methods.md
    6.2). Returns [groups, d_out, d_in(+1)]. Examples are taken in chunks, so that memory stays bounded.
    """
    a = [_rotated(_with_ones(use, bias=bias), input_basis) for use, _ in uses]
    g = [_rotated(_wide(rows), output_basis) for _, rows in uses]
    if len(uses) == 1 and a[0].shape[2] == 1:  # one position: the square of an outer product
        return (g[0].squeeze(2) ** 2).mT @ (a[0].squeeze(2) ** 2)
    left, right = torch.cat(g, 2), torch.cat(a, 2)
    groups, num = left.shape[:2]
    size = max(1, _LARGEST_CHUNK // (groups * left.shape[-1] * right.shape[-1]))
    total = None
    for start in range(0, num, size):
        gradients = left[:, start : start + size].mT @ right[:, start : start + size]
        square = (gradients**2).sum(1)
        total = square if total is None else total + square
    assert total is not None
    return total


def squared_projections_of_indices(
    uses: Sequence[tuple[Tensor, Tensor]], output_basis: Tensor | None, *, size: int, padding_idx: int
) -> Tensor:
    """The same for one-hot inputs: [1, d_out, size], without a dense gradient per example.

    uses: indices, one per row, and rows [1, N, T, d_out] of each use. Positions of one example with the same
    index are summed before the square: (sum y)^2 = sum y_t (sum of y over positions with the index of t).
    """
    y = torch.cat([_rotated(_wide(rows), output_basis)[0] for _, rows in uses], 1)
    index = torch.cat([indices.reshape(rows.shape[1:3]) for indices, rows in uses], 1)
    same = (index.unsqueeze(2) == index.unsqueeze(1)).to(y.dtype)
    kept = (index != padding_idx).to(y.dtype).unsqueeze(-1)
    products = (y * (same @ y) * kept).flatten(0, 1)
    table = torch.zeros(size, y.shape[-1], dtype=y.dtype, device=y.device)
    return table.index_add(0, index.reshape(-1), products).mT.unsqueeze(0)


def _rotated(rows: Tensor, basis: Tensor | None) -> Tensor:
    return rows if basis is None else rows @ basis.to(rows.dtype).unsqueeze(1)


def channel_moments(x: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Mean [groups, C] and second moment [groups, C, C] over examples and pixels of [N, groups * C, *space].

    Grosse & Martens 2016 (arXiv:1602.01407), section 3 and appendix, spatially uncorrelated activations.
    Zeros that the kernel reads count: padded pixels and, for a transposed convolution, those between pixels.
    """
    if geometry.transposed:
        x, geometry = upsampled(x, geometry)
    x = F.pad(x, [side for p in reversed(geometry.padding) for side in (p, p)])
    channels = x.shape[1] // geometry.groups
    flat = _wide(x).reshape(x.shape[0], geometry.groups, channels, -1)
    rows = flat.permute(1, 0, 3, 2).reshape(geometry.groups, -1, channels)
    return rows.mean(1), rows.mT @ rows / rows.shape[1]


def kernel_sums(rows: Tensor, volume: int) -> Tensor:
    """Patches summed over the kernel's `volume` positions: [..., C * volume] -> [..., C]."""
    return rows.unflatten(-1, (-1, volume)).sum(-1)


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


def _wide(rows: Tensor) -> Tensor:
    return rows.to(statistics_dtype(rows.dtype))
