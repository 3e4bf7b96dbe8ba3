"""The autocorrelation of images at the few lags that a convolution's kernel spans.

`R[h, h', o] = sum over examples and pixels u of x[h, u] x[h', u + d o]`, x extended by zeros, for the offsets
o between two taps of a kernel. Half of them determine the rest, `R[h, h', -o] = R[h', h, o]`, so o_1 >= 0.

Two ways, both exact: the discrete Fourier transform of every image, long enough that nothing wraps around,
written as matrix products (a Gram matrix per frequency, then back at the wanted offsets alone); or the
weight gradient of a convolution with the image in both its seats. Tensors in, tensors out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight, conv3d_weight

from kfac_fx.forms import num_frequencies, periods_without_wrap
from kfac_fx.layout import Geometry

_WEIGHT_GRADIENT = {2: conv2d_weight, 3: conv3d_weight}


def lags_by_products(x: Tensor, geometry: Geometry) -> Tensor:
    """R of lines [N, C, length], one matrix product per offset: [groups, C/groups, C/groups, K]."""
    (kernel,), (dilation,), length = geometry.kernel, geometry.dilation, x.shape[2]
    rows = x.unflatten(1, (geometry.groups, -1)).permute(1, 2, 0, 3)  # [groups, C, N, length]
    lags = []
    for tap in range(kernel):
        kept = max(length - dilation * tap, 0)
        left, right = rows.narrow(3, 0, kept), rows.narrow(3, length - kept, kept)
        lags.append(left.flatten(2) @ right.flatten(2).mT)
    return torch.stack(lags, 3)


def lags_by_convolution(x: Tensor, geometry: Geometry) -> Tensor:
    """R of images [N, C, *space] (two or three axes): [groups, C/groups, C/groups, K1, 2 K2 - 1, ...]."""
    kernel, channels, rank = geometry.kernel, x.shape[1] // geometry.groups, len(geometry.kernel)
    reach = [d * (k - 1) for k, d in zip(kernel, geometry.dilation, strict=True)]
    gradient = _WEIGHT_GRADIENT[rank](
        F.pad(x, [0, 0] * (rank - 1) + [0, reach[0]]),
        [x.shape[1], channels, kernel[0], *(2 * k - 1 for k in kernel[1:])],
        x,
        padding=(0, *reach[1:]),  # type: ignore[arg-type]
        dilation=geometry.dilation,  # type: ignore[arg-type]
        groups=geometry.groups,
    )
    return gradient.unflatten(0, (geometry.groups, channels))


def lags_by_transform(x: Tensor, geometry: Geometry) -> Tensor:
    """What `lags_by_convolution` returns, through the discrete Fourier transform."""
    groups, channels = geometry.groups, x.shape[1] // geometry.groups
    periods = periods_without_wrap(replace(geometry, space=tuple(x.shape[2:])))
    real, imaginary = _transformed(x, periods)
    if groups > 1:  # [frequencies, N, groups, C] -> a batch of matrices per group
        split = (t.unflatten(2, (groups, channels)).transpose(1, 2).flatten(0, 1) for t in (real, imaginary))
        real, imaginary = split
    even = torch.baddbmm(real.mT @ real, imaginary.mT, imaginary)
    odd = real.mT @ imaginary
    cosines, sines = _inverse_tables(periods, geometry, x)
    frequencies = cosines.shape[1]
    symmetric = (cosines @ even.reshape(frequencies, -1)).unflatten(1, (groups, channels, channels))
    skew = (sines @ odd.reshape(frequencies, -1)).unflatten(1, (groups, channels, channels))
    lags = (symmetric - (skew - skew.mT)).permute(1, 2, 3, 0).contiguous()
    return lags.unflatten(3, (geometry.kernel[0], *(2 * k - 1 for k in geometry.kernel[1:])))


def _transformed(x: Tensor, periods: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of the transform of [N, C, *space]: [frequencies, N, C] each."""
    space, rank = x.shape[2:], len(periods)
    sizes = num_frequencies(periods)
    y = x.permute(*range(2, 2 + rank), 0, 1).reshape(*space, -1)
    cosine, sine = _table(sizes[-1], space[-1], periods[-1], x)
    y = torch.cat([cosine, -sine]) @ y  # [..., (2, F), N C]
    for axis in reversed(range(rank - 1)):
        cosine, sine = _table(sizes[axis], space[axis], periods[axis], x)
        rows = torch.stack([cosine, sine], 2).flatten(1), torch.stack([-sine, cosine], 2).flatten(1)
        y = torch.cat(rows) @ y.reshape(*space[:axis], 2 * space[axis], -1)
    real, imaginary = y.reshape(2, -1, x.shape[0], x.shape[1]).unbind(0)
    return real, imaginary


def _table(frequencies: int, length: int, period: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of 2 pi f u / period: [frequencies, length], rounded once."""
    f = torch.arange(frequencies, device=like.device).unsqueeze(1)
    angle = (f * torch.arange(length, device=like.device) % period).to(torch.float64) * (2 * math.pi / period)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _inverse_tables(periods: Sequence[int], geometry: Geometry, like: Tensor) -> tuple[Tensor, Tensor]:
    """What takes even and odd parts of all frequencies to the offsets: [offsets, frequencies] each."""
    rank, sizes = len(periods), num_frequencies(periods)
    turns = torch.zeros((1,) * 2 * rank, dtype=torch.float64, device=like.device)
    for axis, (k, d, period) in enumerate(zip(geometry.kernel, geometry.dilation, periods, strict=True)):
        offset = torch.arange(1 - k if axis else 0, k, device=like.device) * d
        product = offset.unsqueeze(1) * torch.arange(sizes[axis], device=like.device) % period
        shape = [1] * 2 * rank
        shape[axis], shape[rank + axis] = product.shape
        turns = turns + (product.to(torch.float64) / period).reshape(shape)
    last = torch.arange(sizes[-1], device=like.device)
    alone = (last == 0) | (2 * last == periods[-1])  # the others stand for their mirror images too
    weight = torch.where(alone, 1.0, 2.0).to(torch.float64) / math.prod(periods)
    angle = 2 * math.pi * turns
    tables = (angle.cos() * weight, angle.sin() * weight)
    cosines, sines = (t.reshape(-1, math.prod(sizes)).to(like.dtype) for t in tables)
    return cosines, sines
