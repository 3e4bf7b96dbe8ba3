"""Second moments of a convolution's patches from the image's autocorrelation, without the patches.

An entry of A sums products of two pixels over output positions o: `A[(h,k),(h',k')] = sum_o x[h, o + d k]
x[h', o + d k']`. With the image extended by zeros and o running over all integers the sum depends on the
distance k' - k alone: it is the autocorrelation of the image at one of few lags. What outputs beyond the
edges would have read is subtracted: strips a few pixels wide, themselves convolutions of one dimension less.
Strides become channels first (phases). All of it is exact. methods.md 1.4. Plans do not choose these forms
yet.

Enters: an image [N, C, *space] and a geometry. Leaves: sums over examples and positions, features in the
order of `gram.patches`. Tensors only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_fx.forms import LARGEST_PATCHES, Form, expansion
from kfac_fx.gram import gram, patches
from kfac_fx.lags import lags_by_convolution, lags_by_products, lags_by_transform
from kfac_fx.layout import Geometry, phase_geometry

Lags = Callable[[Tensor, Geometry], Tensor]


def patch_moment(x: Tensor, geometry: Geometry, form: Form) -> Tensor:
    """Sum of a a^T over all patches, in this form: [groups, C/groups * K, C/groups * K]."""
    if form == "pixels":
        return gram(_pixels(x, geometry))
    if form == "patches":
        chunks = max(1, min(x.shape[0], round(expansion(geometry) / LARGEST_PATCHES)))
        parts = [gram(patches(part, geometry)) for part in x.chunk(chunks)]
        return sum(parts[1:], start=parts[0])
    lags = lags_by_transform if form == "transform" else lags_by_convolution
    return (polyphase if max(geometry.stride) > 1 else autocorrelation)(x, geometry, lags)


def _pixels(x: Tensor, geometry: Geometry) -> Tensor:
    """What a kernel of one tap reads: [groups, N, T, C/groups], a view where nothing is padded."""
    if any(geometry.padding):
        x = F.pad(x, [side for p in reversed(geometry.padding) for side in (p, p)])
    x = x[(..., *(slice(None, None, stride) for stride in geometry.stride))]
    return x.flatten(2).unflatten(1, (geometry.groups, -1)).permute(1, 0, 3, 2)


def autocorrelation(x: Tensor, geometry: Geometry, lags: Lags) -> Tensor:
    """Sum of a a^T of a convolution with stride 1: [groups, C/groups * K, C/groups * K].

    lags: how the autocorrelation of images is computed (that of lines is by products).
    """
    if not geometry.kernel:
        return gram(x.unflatten(1, (geometry.groups, -1)).transpose(0, 1))
    if len(geometry.kernel) == 1:
        moment = _spread(lags_by_products(x, geometry), geometry.kernel)
    else:
        moment = _spread(lags(x, geometry), geometry.kernel)
    for axis, kernel in enumerate(geometry.kernel):
        beyond = geometry.dilation[axis] * (kernel - 1) - geometry.padding[axis]
        if beyond > 0:
            moment = _without_edges(moment, x, geometry, axis, beyond, lags)
    return moment


def polyphase(x: Tensor, geometry: Geometry, lags: Lags) -> Tensor:
    """`autocorrelation` for strides without dilation: phases are channels, taps beyond K are dropped."""
    rank, channels = len(geometry.kernel), x.shape[1] // geometry.groups
    geometry = replace(geometry, space=tuple(x.shape[2:]))
    small = phase_geometry(geometry)
    sides: list[int] = []
    for axis in reversed(range(rank)):
        before = geometry.padding[axis]
        sides += [before, small.space[axis] * geometry.stride[axis] - x.shape[2 + axis] - before]
    x = F.pad(x, sides)
    for axis, stride in enumerate(geometry.stride):
        x = x.unflatten(2 + 2 * axis, (-1, stride))  # [N, C, J1, s1, J2, s2, ...]
    x = x.permute(0, 1, *range(3, 3 + 2 * rank, 2), *range(2, 2 + 2 * rank, 2)).flatten(1, 1 + rank)
    moment = autocorrelation(x, small, lags)
    feature = _phase_features(channels, geometry.kernel, geometry.stride, small.kernel, x.device)
    return moment.index_select(1, feature).index_select(2, feature)


def _phase_features(
    channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    taps: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Where feature (channel, k1, k2, ...) stands among (channel, phases, taps)."""
    index = torch.arange(channels, device=device)
    for k, s in zip(kernel, stride, strict=True):
        index = index.unsqueeze(-1) * s + torch.arange(k, device=device) % s  # [C, K1, K2, ...]
    for axis, (k, s, t) in enumerate(zip(kernel, stride, taps, strict=True)):
        tap = torch.arange(k, device=device) // s
        index = index * t + tap.reshape(k, *(1,) * (len(kernel) - 1 - axis))
    return index.flatten()


def _spread(lags: Tensor, kernel: Sequence[int]) -> Tensor:
    """Every pair of taps takes its offset's entry: [groups, C * K, C * K]."""
    groups, channels = lags.shape[:2]
    row = math.prod(lags.shape[4:])
    flat = lags.flatten(3)
    if kernel[0] > 1:  # R[h, h', -delta] = R[h', h, delta], and -delta stands at the mirrored place
        negative = flat.transpose(1, 2).flip(3)[..., : flat.shape[3] - row]
        flat = torch.cat([negative, flat], 3)
    rank, volume = len(kernel), math.prod(kernel)
    index = torch.zeros((1,) * 2 * rank, dtype=torch.long, device=lags.device)
    for axis, k in enumerate(kernel):
        tap = torch.arange(k, device=lags.device)
        offset = tap - tap.unsqueeze(1) + k - 1  # [k, k']
        sizes = [1] * 2 * rank
        sizes[axis], sizes[rank + axis] = k, k
        index = index * (2 * k - 1) + offset.reshape(sizes)
    channel = torch.arange(channels, device=lags.device).unsqueeze(1) * flat.shape[3]
    columns = index.reshape(volume, 1, volume) + channel
    return flat.flatten(2).index_select(2, columns.flatten()).reshape(groups, channels * volume, -1)


def _without_edges(
    moment: Tensor, x: Tensor, geometry: Geometry, axis: int, beyond: int, lags: Lags
) -> Tensor:
    """Subtract what outputs would have read that lie up to `beyond` before or after the grid on this axis.

    On later axes outputs beyond the edges count too: those of earlier axes are subtracted there.
    """
    size, kernel, dilation = x.shape[2 + axis], geometry.kernel[axis], geometry.dilation[axis]
    padding = geometry.padding[axis]
    end = size + 2 * padding - dilation * (kernel - 1)
    groups, channels = geometry.groups, x.shape[1] // geometry.groups
    before, after = math.prod(geometry.kernel[:axis]), math.prod(geometry.kernel[axis + 1 :])
    whole = moment.reshape(groups, *(channels, before, kernel, after) * 2)
    for first in (-beyond, end):
        outputs = range(first, first + beyond)
        taps = [t for t in range(kernel) if any(0 <= o + dilation * t - padding < size for o in outputs)]
        if not taps:
            continue
        strip = _strip(x, 2 + axis, [outputs[0] + dilation * t - padding for t in taps], beyond)
        rest = _remaining(geometry, axis)  # lines are short, so their patches are small
        part = gram(patches(strip, rest)) if len(rest.kernel) == 1 else autocorrelation(strip, rest, lags)
        part = part.reshape(groups, *(channels, len(taps), before, after) * 2)
        part = part.permute(0, 1, 3, 2, 4, 5, 7, 6, 8)
        sides = (taps[0], kernel - 1 - taps[-1])
        whole = whole - F.pad(part, (0, 0, *sides, *(0,) * 6, *sides))
    return whole.reshape(moment.shape)


def _strip(x: Tensor, axis: int, starts: Sequence[int], length: int) -> Tensor:
    """`length` pixels from each of `starts` along an axis, zeros outside the image.

    The starts become channels (after the channel), the pixels examples: the axis is gone.
    """
    size, least, most = x.shape[axis], starts[0], starts[-1] + length
    inside = x.narrow(axis, max(least, 0), min(most, size) - max(least, 0))
    inside = F.pad(inside, [0, 0] * (x.dim() - 1 - axis) + [max(-least, 0), max(most - size, 0)])
    windows = torch.stack([inside.narrow(axis, start - least, length) for start in starts], 2)
    return windows.movedim(axis + 1, 0).flatten(0, 1).flatten(1, 2)


def _remaining(geometry: Geometry, axis: int) -> Geometry:
    """The other axes; of those after `axis` every output that reads anything."""
    full = [d * (k - 1) for k, d in zip(geometry.kernel, geometry.dilation, strict=True)]

    def others(values: Sequence[int]) -> tuple[int, ...]:
        return (*values[:axis], *values[axis + 1 :])

    return replace(
        geometry,
        kernel=others(geometry.kernel),
        stride=others(geometry.stride),
        padding=(*geometry.padding[:axis], *full[axis + 1 :]),
        dilation=others(geometry.dilation),
    )
