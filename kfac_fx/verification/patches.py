"""Explicit im2col of convolutions of any rank, plain and transposed, by an index for every entry.

Written from the definition of the operator alone (methods.md 1.4); no code of the library is called.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Window:
    """What a convolution reads, per axis. left: padding before the first pixel. outputs: of the result."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    left: tuple[int, ...]
    dilation: tuple[int, ...]
    outputs: tuple[int, ...]
    groups: int
    transposed: bool


def im2col(x: Tensor, window: Window) -> Tensor:
    """[N, C, *space] -> [groups, N, T, C/groups * K]; features channel first, then the kernel row-major.

    Output t of a convolution reads pixel `t stride - left + k dilation` with tap k; of a transposed one pixel
    `(t + left - k dilation) / stride` where that is whole. Pixels that do not exist are zero.
    """
    rank = len(window.kernel)
    read, known = x, torch.ones((), dtype=torch.bool, device=x.device)
    for axis in range(rank):  # [N, C, t0, k0, t1, k1, ...]
        places, exists = _places(axis, x.shape[2 + axis], window)
        places, exists = places.to(x.device), exists.to(x.device)
        at = 2 + 2 * axis
        read = read.index_select(at, places.flatten()).unflatten(at, places.shape)
        known = known.reshape(*known.shape, 1, 1) & exists
    read = read * known.to(read.dtype)
    num, channels = x.shape[:2]
    outputs, taps = [2 + 2 * axis for axis in range(rank)], [3 + 2 * axis for axis in range(rank)]
    rows = read.permute(0, *outputs, 1, *taps)
    per_group = channels // window.groups * math.prod(window.kernel)
    return rows.reshape(num, math.prod(window.outputs), window.groups, per_group).permute(2, 0, 1, 3)


def _places(axis: int, size: int, window: Window) -> tuple[Tensor, Tensor]:
    """(pixel, whether it exists) of every output and tap along one axis: [outputs, taps]."""
    output = torch.arange(window.outputs[axis])[:, None]
    tap = torch.arange(window.kernel[axis])[None] * window.dilation[axis]
    stride, left = window.stride[axis], window.left[axis]
    if window.transposed:
        scaled = output + left - tap
        exists = scaled % stride == 0
        pixel = torch.div(scaled, stride, rounding_mode="floor")
    else:
        pixel = output * stride - left + tap
        exists = torch.ones_like(pixel, dtype=torch.bool)
    exists = exists & (pixel >= 0) & (pixel < size)
    return pixel.clamp(0, size - 1), exists
