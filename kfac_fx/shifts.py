"""Second moments of a convolution's patches from products of shifted images, without the patches.

The best form for few pixels with many channels, and one that any stride and dilation have. Which products,
`boxes` says. Enters: an image [N, C, *space] and a geometry. Leaves: sums over examples and positions,
features in the order of `windows.patches`. Tensors only.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from kfac_fx.boxes import Box, recipe
from kfac_fx.layout import Geometry


def moment_by_shifts(x: Tensor, geometry: Geometry) -> Tensor:
    """Sum of a a^T over all patches: [groups, C/groups * K, C/groups * K]."""
    geometry = replace(geometry, space=tuple(x.shape[2:]))
    rank, found = len(geometry.kernel), recipe(geometry)
    pixels = x.unflatten(1, (geometry.groups, -1)).permute(1, *range(3, 3 + rank), 0, 2).contiguous()
    moments: dict[Box | None, Tensor] = {None: pixels.new_zeros(geometry.groups, *(pixels.shape[-1],) * 2)}
    for box, parts in found.parts.items():
        moments[box] = _product(pixels, box, found.steps) if not parts else moments[parts[0]]
        for part in parts[1:]:
            moments[box] = moments[box] - moments[part]
    volume = math.prod(geometry.kernel)
    lines = []
    for i in range(volume):
        mirrored = [moments[found.pairs[j, i]].mT for j in range(i)]
        line = [*mirrored, *(moments[found.pairs[i, j]] for j in range(i, volume))]
        lines.append(torch.stack(line, -1))
    return torch.stack(lines, 2).flatten(3).flatten(1, 2)


def _product(pixels: Tensor, box: Box, steps: tuple[int, ...]) -> Tensor:
    """Sum over the pixels of a box, each times its partner. [groups, *space, N, C] -> [groups, C, C]."""
    left = _rows(pixels, box, steps, moved=False)
    right = left if box.centred else _rows(pixels, box, steps, moved=True)
    if left.shape[0] == 1:  # in less time than a batch of one
        return (left[0].mT @ right[0]).unsqueeze(0)
    return left.mT @ right


def _rows(pixels: Tensor, box: Box, steps: tuple[int, ...], *, moved: bool) -> Tensor:
    """The pixels of a box, or their partners: [groups, pixels times N, C]."""
    for axis, ((shift, first, count), step) in enumerate(zip(box.lines, steps, strict=True), start=1):
        start = first + shift * moved
        if count < pixels.shape[axis]:
            pixels = pixels[(slice(None),) * axis + (slice(start, start + step * (count - 1) + 1, step),)]
    return pixels.flatten(1, -2)
