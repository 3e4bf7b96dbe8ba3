"""The autocorrelation of images at the few lags that a convolution's kernel spans.

`R[h, h', o] = sum over examples and pixels u of x[h, u] x[h', u + d o]`, x extended by zeros, for the offsets
o between two taps of a kernel, K - 1 in both directions of each axis. All functions return
[groups, C/groups, C/groups, offsets].

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

from kfac_fx.estimates import num_frequencies, periods_without_wrap
from kfac_fx.forms import transform_chunks
from kfac_fx.graph import constant
from kfac_fx.layout import Geometry

_WEIGHT_GRADIENT = {2: conv2d_weight, 3: conv3d_weight}


def lags_by_products(x: Tensor, geometry: Geometry, chunks: int) -> Tensor:
    """R of lines [N, C, length], as products with the line moved. chunks: in how many parts of the batch."""
    (kernel,), (dilation,), channels = geometry.kernel, geometry.dilation, x.shape[1] // geometry.groups
    total, reach = None, dilation * (kernel - 1)
    for part in x.chunk(chunks):
        rows = part.unflatten(1, (geometry.groups, -1)).permute(1, 2, 0, 3)  # [groups, C, N, length]
        moved = F.pad(rows, (reach, reach)).unfold(3, rows.shape[3], dilation)  # [..., offsets, length]
        product = torch.bmm(rows.flatten(2), moved.permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2))
        total = product if total is None else total + product
    assert total is not None
    return total.unflatten(2, (channels, 2 * kernel - 1))


def lags_by_convolution(x: Tensor, geometry: Geometry) -> Tensor:
    """R of images [N, C, *space] (two or three axes), as the gradient of a weight."""
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
    return _both_directions(gradient.unflatten(0, (geometry.groups, channels)))


def _both_directions(lags: Tensor) -> Tensor:
    """All offsets from those that do not point back along the first axis, [groups, C, C, K1, ...].

    R[h, h', -o] = R[h', h, o], and -o stands at the mirrored place.
    """
    flat = lags.flatten(3)
    back = (lags.shape[3] - 1) * (flat.shape[3] // lags.shape[3])
    return torch.cat([flat.transpose(1, 2).flip(3)[..., :back], flat], 3) if back else flat


def lags_by_transform(x: Tensor, geometry: Geometry) -> Tensor:
    """R of images [N, C, *space] (two or three axes), through the discrete Fourier transform."""
    groups, channels = geometry.groups, x.shape[1] // geometry.groups
    geometry = replace(geometry, space=tuple(x.shape[2:]))
    periods = periods_without_wrap(geometry)
    parts = _transformed(x, periods)  # [frequencies, real and imaginary, N, C]
    like = x.dtype, x.device
    cosines, sines = (constant(_back, part, tuple(periods), geometry, *like) for part in ("even", "odd"))
    chunks = transform_chunks(geometry, x.shape[0], x.shape[1])
    symmetric = skew = None
    pieces = (parts, 0), (cosines, 1), (sines, 1)
    for part, cosine, sine in zip(*(t.chunk(chunks, d) for t, d in pieces), strict=True):
        num = part.shape[0]
        if groups > 1:  # a batch of matrices per group
            part = part.unflatten(3, (groups, channels)).movedim(3, 1).flatten(0, 1)
        rows = part.flatten(1, 2)
        even, odd = torch.bmm(rows.mT, rows), torch.bmm(part[:, 0].mT, part[:, 1])
        symmetric = _plus(symmetric, cosine, even.reshape(num, -1))
        skew = _plus(skew, sine, odd.reshape(num, -1))
    assert symmetric is not None and skew is not None
    skew = skew.unflatten(1, (groups, channels, channels))
    return (symmetric.view_as(skew) - (skew - skew.mT)).permute(1, 2, 3, 0)


def _plus(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right) if total is None else torch.addmm(total, left, right)


def _transformed(x: Tensor, periods: Sequence[int]) -> Tensor:
    """Real and imaginary part of the transform of [N, C, *space]: [frequencies, 2, N, C].

    Frequencies run over the last axis first.
    """
    space, rank, num_examples, channels = x.shape[2:], len(periods), x.shape[0], x.shape[1]
    sizes = num_frequencies(periods)
    y = x.permute(*range(2, 2 + rank), 0, 1).reshape(math.prod(space[:-1]), space[-1], -1)
    y = _products(
        constant(_first, sizes[-1], space[-1], periods[-1], x.dtype, x.device), y
    )  # [., (2, F), N C]
    done = sizes[-1]
    y = y.reshape(math.prod(space[:-1]), 2, done, -1)
    for axis in reversed(range(rank - 1)):
        table = constant(_second, sizes[axis], space[axis], periods[axis], x.dtype, x.device)
        y = y.reshape(-1, 2 * space[axis], done, y.shape[-1]).transpose(1, 2).flatten(0, 1)
        y = _products(table, y)  # [(rest, frequencies), (F, 2), N C]
        y = y.reshape(-1, done, sizes[axis], 2, y.shape[-1])
        done *= sizes[axis]
        y = y.permute(0, 3, 1, 2, 4).reshape(-1, 2, done, y.shape[-1]) if axis else y.flatten(0, 2)
    return y.reshape(done, 2, num_examples, channels)


def _products(table: Tensor, batch: Tensor) -> Tensor:
    """One matrix times every matrix of a batch."""
    return torch.bmm(table.expand(batch.shape[0], -1, -1), batch)


def _waves(frequencies: int, length: int, period: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of 2 pi f u / period: [frequencies, length]."""
    f = torch.arange(frequencies).unsqueeze(1)
    angle = (f * torch.arange(length) % period).to(torch.float64) * (2 * math.pi / period)
    return angle.cos(), angle.sin()


def _first(frequencies: int, length: int, period: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The transform of real numbers: [(2, frequencies), length]."""
    cosine, sine = _waves(frequencies, length, period)
    return torch.cat([cosine, -sine]).to(dtype=dtype, device=device)


def _second(frequencies: int, length: int, period: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The transform of complex numbers: [(frequencies, 2), (length, 2)]."""
    cosine, sine = _waves(frequencies, length, period)
    rows = torch.stack([cosine, sine], 2).flatten(1), torch.stack([-sine, cosine], 2).flatten(1)
    return torch.stack(rows, 1).flatten(0, 1).to(dtype=dtype, device=device)


def _back(
    part: str, periods: Sequence[int], geometry: Geometry, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What takes the even or the odd part of all frequencies to the offsets: [offsets, frequencies]."""
    rank, sizes = len(periods), num_frequencies(periods)
    turns = torch.zeros((1,) * 2 * rank, dtype=torch.float64)
    for axis, (k, d, period) in enumerate(zip(geometry.kernel, geometry.dilation, periods, strict=True)):
        product = (torch.arange(1 - k, k) * d).unsqueeze(1) * torch.arange(sizes[axis]) % period
        shape = [1] * 2 * rank
        shape[axis], shape[-1 - axis] = product.shape  # frequencies: the last axis first
        turns = turns + (product.to(torch.float64) / period).reshape(shape)
    last = torch.arange(sizes[-1])
    alone = (last == 0) | (2 * last == periods[-1])  # the others stand for their mirror images too
    weight = torch.where(alone, 1.0, 2.0).to(torch.float64) / math.prod(periods)
    angle = 2 * math.pi * turns
    table = (angle.cos() if part == "even" else angle.sin()) * weight.reshape(-1, *(1,) * (rank - 1))
    return table.reshape(-1, math.prod(sizes)).to(dtype=dtype, device=device)
