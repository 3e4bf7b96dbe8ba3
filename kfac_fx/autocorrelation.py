"""Second moments of a convolution's patches from the image's autocorrelation, without the patches.

An entry of A sums products of two pixels over output positions o: `A[(h,k),(h',k')] = sum_o x[h, o + d k]
x[h', o + d k']`. With the image extended by zeros and o running over all integers the sum depends on the
distance k' - k alone: it is the autocorrelation of the image at one of few lags. What outputs beyond the
edges would have read is subtracted: strips a few pixels wide, themselves convolutions of one dimension less.
Strides become channels first (phases). All of it is exact. methods.md 1.4; means over positions are box sums.

Enters: an image [N, C, *space] and a geometry. Leaves: sums over examples and positions, features in the
order of `windows.patches`. Tensors only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_fx.estimates import Form, edge_subsets
from kfac_fx.forms import product_chunks
from kfac_fx.gram import InputMoment, InputRows, gram, moment_of_rows, statistics_dtype
from kfac_fx.graph import constant
from kfac_fx.lags import lags_by_convolution, lags_by_products, lags_by_transform
from kfac_fx.layout import Geometry, along, lines_beyond, output_sizes, phase_geometry
from kfac_fx.shifts import moment_by_shifts
from kfac_fx.windows import patch_parts, position_sums

Lags = Callable[[Tensor, Geometry], Tensor]


def input_moment(x: Tensor, geometry: Geometry, *, form: Form, ones: bool) -> InputMoment:
    """What the patches of a convolution's input add up to, computed in this form."""
    wide = x.to(statistics_dtype(x.dtype))
    x = x if form in ("patches", "pixels") else wide  # `gram` knows rows of half precision
    sums = position_sums(wide.sum(0, keepdim=True), geometry, ones=ones)
    count = x.shape[0] * sums.positions
    return InputMoment(moment=patch_moment(x, geometry, form), total=sums.sums[:, 0], count=count, ones=ones)


def masked_moment(x: Tensor, geometry: Geometry, *, form: Form, ones: bool, kept: Tensor) -> InputMoment:
    """Of the patches that count, in a form by rows. kept: [N, T], 1 for them and 0 for the others."""
    if form == "pixels":
        return moment_of_rows(InputRows(rows=_pixels(x, geometry), ones=ones, kept=kept))
    assert form == "patches", f"no rows to leave out in the form {form!r}"
    parts = [
        moment_of_rows(InputRows(rows=rows, ones=ones, kept=kept[examples, positions]))
        for examples, positions, rows in patch_parts(x, geometry)
    ]
    return InputMoment(
        moment=functools.reduce(torch.add, (part.moment for part in parts)),
        total=functools.reduce(torch.add, (part.total for part in parts)),
        count=kept.sum().clamp(min=1),
        ones=ones,
    )


def patch_moment(x: Tensor, geometry: Geometry, form: Form) -> Tensor:
    """Sum of a a^T over all patches, in this form: [groups, C/groups * K, C/groups * K]."""
    if form == "pixels":
        return gram(_pixels(x, geometry))
    if form == "patches":
        return functools.reduce(torch.add, (gram(rows) for _, _, rows in patch_parts(x, geometry)))
    if form == "shifts":
        return moment_by_shifts(x, geometry)
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

    By inclusion and exclusion: the lags of the whole image; less those of outputs beyond the grid along one
    axis, which read lines near two edges only; and those beyond it along two, near the corners. Every pair
    of taps is a sum of a few of these matrices, and all pairs are one product with a table of 0, 1 and -1.
    lags: how the autocorrelation of images is computed (that of lines is by products).
    """
    geometry = replace(geometry, space=tuple(x.shape[2:]))
    subsets = edge_subsets(geometry)
    sources = torch.cat([_sources(x, geometry, axes, lags) for axes in subsets], -1)
    table = constant(_table, geometry, x.dtype, x.device)
    volume, channels = math.prod(geometry.kernel), sources.shape[1]
    pairs = torch.mm(sources.flatten(0, 2), table).unflatten(0, sources.shape[:3])
    pairs = pairs.unflatten(3, (volume, volume)).transpose(2, 3)
    return pairs.reshape(geometry.groups, channels * volume, channels * volume)


def _sources(x: Tensor, geometry: Geometry, axes: Sequence[int], lags: Lags) -> Tensor:
    """Autocorrelations along all other axes of the lines near the edges of these axes.

    Returns [groups, C, C', n]: for every choice of sides, line of one seat, line of the other, and offset.
    """
    groups, kept = geometry.groups, [i for i in range(len(geometry.kernel)) if i not in axes]
    x = x.unflatten(1, (1, groups, -1, 1))  # [N, sides, groups, C, lines, *space]
    for axis in reversed(axes):
        lines, dim = lines_beyond(geometry)[axis], 5 + axis
        near, far = x.narrow(dim, 0, lines), x.narrow(dim, x.shape[dim] - lines, lines)
        x = torch.stack([near, far], 1).flatten(1, 2).movedim(dim, 4).flatten(4, 5)
    sides, channels, lines = x.shape[1], x.shape[3], x.shape[4]
    share = sides * lines * math.prod(geometry.space[i] for i in kept) / math.prod(geometry.space)
    found = _lags(x.flatten(1, 4), along(geometry, kept, sides * groups), lags, share)
    split = found.reshape(sides, groups, channels, lines, channels, lines, -1)
    return split.permute(1, 2, 4, 0, 3, 5, 6).flatten(3)


def _lags(x: Tensor, geometry: Geometry, lags: Lags, share: float) -> Tensor:
    """R of all offsets; of what has no axis left the second moment: [groups, C, C, offsets].

    share: of the image, that x is.
    """
    if not geometry.kernel:
        return gram(x.unflatten(1, (geometry.groups, -1)).transpose(0, 1)).unsqueeze(-1)
    if len(geometry.kernel) == 1:
        return lags_by_products(x, geometry, product_chunks(geometry, x.shape[0], share))
    return lags(x, geometry)


def _table(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Tensor:
    """How often each source counts for each pair of taps: [sources, K * K']."""
    parts = [_part_of_table(geometry, axes) for axes in edge_subsets(geometry)]
    return torch.cat(parts, -1).mT.to(dtype=dtype, device=device).contiguous()


def _part_of_table(geometry: Geometry, axes: Sequence[int]) -> Tensor:
    """Of the sources of these axes: [K * K', n], a product over the axes."""
    rank, num = len(geometry.kernel), len(axes)
    table = torch.ones((1,) * (3 * rank + 2 * num), dtype=torch.long)
    for axis, taps in enumerate(geometry.kernel):  # dims: K, K', then sides, lines, lines', offsets
        if axis in axes:
            place = list(axes).index(axis)
            part = -_edge_table(geometry, axis)
            dims = (2 * rank + place, 2 * rank + num + place, 2 * rank + 2 * num + place)
        else:
            tap, offset = torch.arange(taps), torch.arange(1 - taps, taps)
            part = ((tap - tap.unsqueeze(1)).unsqueeze(-1) == offset).long()
            dims = (2 * rank + 3 * num + axis - sum(edge < axis for edge in axes),)
        shape = [1] * table.dim()
        for dim, size in zip((axis, rank + axis, *dims), part.shape, strict=True):
            shape[dim] = size
        table = table * part.reshape(shape)
    return table.flatten(0, 2 * rank - 1).flatten(1)


def _edge_table(geometry: Geometry, axis: int) -> Tensor:
    """Whether an output beyond the grid reads one line by one tap and another by another.

    Returns [K, K', side, line, line'], 0 or 1.
    """
    taps, dilation, padding = geometry.kernel[axis], geometry.dilation[axis], geometry.padding[axis]
    size, lines = geometry.space[axis], lines_beyond(geometry)[axis]
    line = torch.stack([torch.arange(lines), torch.arange(size - lines, size)])
    output = line - dilation * torch.arange(taps).reshape(-1, 1, 1) + padding  # [K, side, line]
    outputs = size + 2 * padding - dilation * (taps - 1)
    beyond = torch.stack([output[:, 0] < 0, output[:, 1] >= outputs], 1)
    same = output[:, None, :, :, None] == output[None, :, :, None, :]
    return (same & beyond[:, None, :, :, None]).long()


def polyphase(x: Tensor, geometry: Geometry, lags: Lags) -> Tensor:
    """`autocorrelation` for strides without dilation: phases are channels, taps beyond K are dropped."""
    rank, channels = len(geometry.kernel), x.shape[1] // geometry.groups
    geometry = replace(geometry, space=tuple(x.shape[2:]))
    small = phase_geometry(geometry)
    sides: list[int] = []
    for axis, outputs in enumerate(output_sizes(geometry)):  # pixels that no output reads go
        read = (outputs - 1) * geometry.stride[axis] + geometry.kernel[axis] - geometry.padding[axis]
        x = x.narrow(2 + axis, 0, min(read, x.shape[2 + axis]))
    for axis in reversed(range(rank)):
        before = geometry.padding[axis]
        sides += [before, small.space[axis] * geometry.stride[axis] - x.shape[2 + axis] - before]
    x = F.pad(x, sides)
    for axis, stride in enumerate(geometry.stride):
        x = x.unflatten(2 + 2 * axis, (-1, stride))  # [N, C, J1, s1, J2, s2, ...]
    x = x.permute(0, 1, *range(3, 3 + 2 * rank, 2), *range(2, 2 + 2 * rank, 2)).flatten(1, 1 + rank)
    moment = autocorrelation(x, small, lags)
    sizes = geometry.kernel, geometry.stride, small.kernel
    feature = constant(_phase_features, channels, *sizes, x.device)
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
