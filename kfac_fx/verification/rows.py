"""Rows (a, g) of one use of a layer, and plain sums of their products.

Enters: values of the tensors that a use reads. Leaves: rows by the definitions of methods.md 1.3, 1.4 and 9,
examples in slices so that patches of many images never stand in memory at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

_LARGEST = 2**23  # entries of `a` in one slice


@final
@dataclass(frozen=True, kw_only=True)
class UseRows:
    """One use of a layer's weight.

    read: examples -> a [groups, n, T, d] without the column of ones. num: N. width: d. g: per backward pass,
    the loss' own first, [groups, N, T, d_out], scaled. ones: whether the bias belongs to this use. swapped:
    whether the weight is used transposed.
    """

    read: Callable[[slice], Tensor]
    num: int
    width: int
    g: tuple[Tensor, ...]
    ones: bool
    swapped: bool = False

    @property
    def fisher(self) -> tuple[Tensor, ...]:
        """Of the passes that feed the Fisher: those from the prediction if there are any."""
        return self.g[1:] or self.g

    @property
    def positions(self) -> int:
        """T."""
        return self.g[0].shape[2]

    def slices(self, *, per_example: int = 0) -> Iterator[slice]:
        """Examples, a bounded number at a time. per_example: entries that each costs, if not those of `a`."""
        entries = per_example or self.g[0].shape[0] * self.positions * self.width
        size = max(1, _LARGEST // max(entries, 1))
        return (slice(start, min(start + size, self.num)) for start in range(0, self.num, size))

    def inputs(self, examples: slice, *, bias: bool) -> Tensor:
        """`a`, with a column of ones (zeros where the bias is not part of this use) if `bias`."""
        a = self.read(examples)
        if not bias:
            return a
        return torch.cat([a, torch.full_like(a[..., :1], float(self.ones))], -1)


@final
@dataclass(frozen=True, kw_only=True)
class BlockRows:
    """One use of scales and shifts: x, or None for a constant input of one, and g per pass; [rows, positions,
    channels].
    """

    x: Tensor | None
    g: tuple[Tensor, ...]
    ones: bool

    @property
    def fisher(self) -> tuple[Tensor, ...]:
        """As in `UseRows`."""
        return self.g[1:] or self.g

    def gradients(self, g: Tensor, *, bias: bool) -> Tensor:
        """Of each row, positions summed: [rows, channels, k]."""
        shift = g.sum(1)
        if self.x is None:
            return shift.unsqueeze(-1)
        parts = [(self.x.to(g.dtype) * g).sum(1)]
        return torch.stack([*parts, shift * float(self.ones)] if bias else parts, -1)


def rounded_to_bfloat16(use: UseRows) -> UseRows:
    """The same rows, each entry the nearest number of bfloat16."""
    g = tuple(one.bfloat16().to(one.dtype) for one in use.g)
    return replace(use, read=lambda part: use.read(part).bfloat16().float(), g=g)


def gradient(uses: Sequence[UseRows], *, bias: bool) -> tuple[Tensor, Tensor]:
    """(sum of g a^T, sum of |g| |a|^T) of the loss' own pass: [groups, d_out, d_in(+1)] each.

    The second is what rounding of the first is measured by.
    """
    total, size = [], []
    for use in uses:
        for part in use.slices():
            a, g = use.inputs(part, bias=bias).flatten(1, 2), use.g[0][:, part].flatten(1, 2)
            a = a.to(g.dtype)
            product, absolute = g.mT @ a, g.abs().mT @ a.abs()
            total.append(product.mT if use.swapped else product)
            size.append(absolute.mT if use.swapped else absolute)
    return torch.stack(total).sum(0), torch.stack(size).sum(0)


def block_gradient(uses: Sequence[BlockRows], *, bias: bool) -> tuple[Tensor, Tensor]:
    """The same of scales and shifts: [channels, k]."""
    total = torch.stack([use.gradients(use.g[0], bias=bias).sum(0) for use in uses]).sum(0)
    absolute = [
        replace(use, x=None if use.x is None else use.x.abs()).gradients(use.g[0].abs(), bias=bias)
        for use in uses
    ]
    return total, torch.stack([a.sum(0) for a in absolute]).sum(0)
