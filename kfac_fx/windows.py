"""The windows that a convolution's kernel reads: patches, all, in parts or at some positions; sums of them.

Enters: images [N, C, *space] and a geometry. Leaves: patches, or sums over them. Tensors only. methods.md
1.4.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_fx.forms import patch_chunks
from kfac_fx.gram import PositionSums, wide
from kfac_fx.layout import Geometry, output_sizes


def positions_of(geometry: Geometry, space: tuple[int, ...]) -> tuple[int, ...]:
    """Output positions per axis for images of this size."""
    return output_sizes(replace(geometry, space=space))


def patches(x: Tensor, geometry: Geometry) -> Tensor:
    """Patches that a convolution reads, as rows. x: [N, C, *space]. Returns [groups, N, T, C/groups * K].

    Features run channel first, then the kernel in row-major order: the order of `weight.reshape(C_out, -1)`.
    methods.md 1.4.
    """
    if geometry.transposed:
        x, geometry = upsampled(x, geometry)
    elif _mostly_padding(x, geometry):
        return _by_taps(x, geometry, 0, positions_of(geometry, tuple(x.shape[2:]))[0])
    elif any(geometry.padding):
        x = F.pad(x, [side for p in reversed(geometry.padding) for side in (p, p)])
    space = len(geometry.kernel)
    for axis in range(space):
        kernel, dilation = geometry.kernel[axis], geometry.dilation[axis]
        x = x.unfold(2 + axis, dilation * (kernel - 1) + 1, geometry.stride[axis])
    index = (..., *(slice(None, None, d) for d in geometry.dilation))
    x = x[index]  # [N, C, *T, *K]
    if geometry.transposed:
        x = x.flip(tuple(range(-space, 0)))
    return _as_rows(x, geometry)


def _as_rows(x: Tensor, geometry: Geometry) -> Tensor:
    """[N, C, *T, *K] -> [groups, N, T, C/groups * K]."""
    space, groups, volume = len(geometry.kernel), geometry.groups, math.prod(geometry.kernel)
    num, channels, positions = x.shape[0], x.shape[1] // groups, math.prod(x.shape[2 : 2 + space])
    x = x.unflatten(1, (groups, channels))  # a view still: the one copy is the last reshape
    t, k = range(3, 3 + space), range(3 + space, 3 + 2 * space)
    return x.permute(1, 0, *t, 2, *k).reshape(groups, num, positions, channels * volume)


def _mostly_padding(x: Tensor, geometry: Geometry) -> bool:
    """Whether the padded image is larger than all patches."""
    space = tuple(x.shape[2:])
    padded = (size + 2 * p for size, p in zip(space, geometry.padding, strict=True))
    outputs = positions_of(geometry, space)
    return math.prod(padded) > math.prod(outputs) * math.prod(geometry.kernel)


def _by_taps(x: Tensor, geometry: Geometry, start: int, count: int) -> Tensor:
    """Patches of some lines of outputs, tap by tap: the padding of what they read is all that is padded."""
    outputs = positions_of(geometry, tuple(x.shape[2:]))
    for axis, kernel in enumerate(geometry.kernel):
        begin, num = (start, count) if axis == 0 else (0, outputs[axis])
        taps = [_read(x, geometry, axis, tap=tap, start=begin, count=num) for tap in range(kernel)]
        x = torch.stack(taps, -1)
    return _as_rows(x, geometry)


def _read(x: Tensor, geometry: Geometry, axis: int, *, tap: int, start: int, count: int) -> Tensor:
    """What a tap reads for `count` outputs along an axis, zeros beside the image: [..., count, ...]."""
    inside, before = _inside(x, geometry, axis, dim=2 + axis, tap=tap, start=start, count=count)
    after = count - before - inside.shape[2 + axis]
    return F.pad(inside, [0, 0] * (x.dim() - 3 - axis) + [before, after]) if before or after else inside


def _inside(
    x: Tensor, geometry: Geometry, axis: int, *, dim: int, tap: int, start: int, count: int
) -> tuple[Tensor, int]:
    """The pixels that a tap reads along an axis, which is `dim` of x; how many outputs before read none."""
    stride, size = geometry.stride[axis], x.shape[dim]
    begin = geometry.dilation[axis] * tap - geometry.padding[axis] + stride * start
    first = min(count, max(0, -(begin // stride)))
    last = min(count - 1, (size - 1 - begin) // stride)
    if first > last:
        return x.narrow(dim, 0, 0), first
    return x[
        (slice(None),) * dim + (slice(begin + stride * first, begin + stride * last + 1, stride),)
    ], first


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


def patch_parts(x: Tensor, geometry: Geometry) -> Iterator[tuple[slice, slice, Tensor]]:
    """All patches in parts of the batch, of single examples where one has too many: (examples, positions,
    patches [groups, n, t, C/groups * K]). Parts are at most `LARGEST_PATCHES` times as large as x, or one
    line of one example's outputs along the first axis.
    """
    chunks, examples = patch_chunks(geometry), x.shape[0]
    size = max(examples // chunks, 1)
    for start in range(0, examples, size):
        part = x[start : start + size]
        for positions, rows in patches_by_lines(part, geometry, -(-chunks // examples)):
            yield slice(start, start + part.shape[0]), positions, rows


def patches_by_lines(x: Tensor, geometry: Geometry, parts: int) -> Iterator[tuple[slice, Tensor]]:
    """Patches of all of x, in so many parts of the outputs' first axis or more: (positions, patches).

    A part has one line of outputs at least.
    """
    outputs, *others = positions_of(geometry, tuple(x.shape[2:]))
    if parts <= 1:
        yield slice(0, outputs * math.prod(others)), patches(x, geometry)
        return
    lines = max(1, outputs // parts)
    read = _lines_of_transposed if geometry.transposed else _by_taps
    for start in range(0, outputs, lines):
        count = min(lines, outputs - start)
        positions = slice(start * math.prod(others), (start + count) * math.prod(others))
        yield positions, read(x, geometry, start, count)


def _lines_of_transposed(x: Tensor, geometry: Geometry, start: int, count: int) -> Tensor:
    """Patches of some lines of a transposed convolution's outputs, from the lines of x that they read."""
    stride, padding, reach = geometry.stride[0], geometry.padding[0] + start, _reach(geometry, 0)
    first = max(0, -((reach - padding) // stride))
    last = min(x.shape[2] - 1, (padding + count - 1) // stride)
    if first > last:  # between the taps of a kernel that is smaller than the stride
        positions = count * math.prod(positions_of(geometry, tuple(x.shape[2:]))[1:])
        channels, volume = x.shape[1] // geometry.groups, math.prod(geometry.kernel)
        return x.new_zeros(geometry.groups, x.shape[0], positions, channels * volume)
    padding = padding - stride * first
    more = count - (stride * (last - first) + reach + 1 - 2 * padding)
    cut = replace(
        geometry,
        padding=(padding, *geometry.padding[1:]),
        output_padding=(more, *geometry.output_padding[1:]),
    )
    return patches(x.narrow(2, first, last - first + 1), cut)


def patches_at(x: Tensor, geometry: Geometry, positions: Tensor) -> Tensor:
    """Patches at some positions alone. positions: [n]. Returns [groups, N, n, C/groups * K]."""
    space = tuple(x.shape[2:])
    outputs, rank = positions_of(geometry, space), len(space)
    pixel = torch.zeros((1,) * (1 + rank), dtype=torch.int64, device=x.device)
    inside = torch.ones_like(pixel, dtype=torch.bool)
    for axis, size in enumerate(space):
        output = positions // math.prod(outputs[axis + 1 :]) % outputs[axis]
        index, reads = _pixels_read(output, geometry, axis)
        shape = [len(positions), *(1,) * rank]
        shape[1 + axis] = geometry.kernel[axis]
        inside = inside & (reads & (index >= 0) & (index < size)).reshape(shape)
        pixel = pixel * size + index.clamp(0, size - 1).reshape(shape)
    read = x.flatten(2).index_select(2, pixel.flatten())
    read = read.unflatten(2, (len(positions), -1)).masked_fill(~inside.flatten(1), 0.0)
    return read.unflatten(1, (geometry.groups, -1)).permute(1, 0, 3, 2, 4).flatten(3)


def _pixels_read(output: Tensor, geometry: Geometry, axis: int) -> tuple[Tensor, Tensor]:
    """Along one axis: the pixel that each tap reads for these outputs, and whether it reads any: [n, K]."""
    stride, padding = geometry.stride[axis], geometry.padding[axis]
    taps = geometry.dilation[axis] * torch.arange(geometry.kernel[axis], device=output.device)
    if not geometry.transposed:
        index = output.unsqueeze(1) * stride - padding + taps
        return index, torch.ones_like(index, dtype=torch.bool)
    spread = output.unsqueeze(1) + padding - taps
    return torch.div(spread, stride, rounding_mode="floor"), spread % stride == 0


def window_sums(x: Tensor, geometry: Geometry) -> Tensor:
    """Patches summed over the kernel, one axis after the other: [N, C, *space] -> [N, C, T]."""
    if geometry.transposed:
        x, geometry = upsampled(x, geometry)
    outputs = output_sizes(replace(geometry, transposed=False, space=tuple(x.shape[2:])))
    for axis, kernel in enumerate(geometry.kernel):
        taps = (_read(x, geometry, axis, tap=tap, start=0, count=outputs[axis]) for tap in range(kernel))
        x = functools.reduce(torch.add, taps)
    return x.flatten(2)


def position_sums(x: Tensor, geometry: Geometry, *, ones: bool) -> PositionSums:
    """Sums of each example's patches, without the patches: box sums, one axis after the other."""
    x, outputs = wide(x), positions_of(geometry, tuple(x.shape[2:]))
    for axis, count in enumerate(outputs):  # the axis' pixels go, its taps come last
        x = torch.stack([_box(x, geometry, axis, tap, count) for tap in range(geometry.kernel[axis])], -1)
    sums = x.flatten(2).unflatten(1, (geometry.groups, -1)).flatten(2).transpose(0, 1)
    return PositionSums(sums=sums, positions=math.prod(outputs), ones=ones)


def _box(x: Tensor, geometry: Geometry, axis: int, tap: int, count: int) -> Tensor:
    """Sum over the pixels that one tap reads along the third axis of x, which is the geometry's `axis`."""
    if geometry.transposed:  # pixel i is read by output stride * i + start
        stride, size = geometry.stride[axis], x.shape[2]
        start = geometry.dilation[axis] * tap - geometry.padding[axis]
        first, last = max(0, -(start // stride)), min(size - 1, (count - 1 - start) // stride)
        return x[:, :, first : max(last + 1, first)].sum(2)
    return _inside(x, geometry, axis, dim=2, tap=tap, start=0, count=count)[0].sum(2)


def _reach(geometry: Geometry, axis: int) -> int:
    """Pixels between the first tap and the last."""
    return geometry.dilation[axis] * (geometry.kernel[axis] - 1)
