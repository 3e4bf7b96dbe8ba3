"""Which products of shifted images the second moment of a convolution's patches is made of.

Two taps of a kernel read, over all outputs, the pixels of one box and those of the same box moved by their
distance. Boxes of one distance differ by thin slabs at the edges alone, so the product of their hull and
those of the slabs give them all. Enters: a geometry. Leaves: boxes, plain numbers. methods.md 1.4.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, final

from kfac_fx.layout import Geometry, output_sizes

Line: TypeAlias = tuple[int, int, int]  # shift, first pixel, number of pixels, a stride apart


@final
@dataclass(frozen=True)
class Box:
    """Pixels, a line of them per axis, and how far each is from its partner."""

    lines: tuple[Line, ...]

    @property
    def size(self) -> int:
        """Number of pixels."""
        return math.prod(count for _, _, count in self.lines)

    @property
    def centred(self) -> bool:
        """Whether every pixel is its own partner."""
        return not any(shift for shift, _, _ in self.lines)


@final
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to multiply and what to subtract.

    parts: of every box, in an order in which parts come first. No parts: a product of its own; else the
    moment is that of the first part less those of the others. pairs: the box of every pair of taps i <= j, in
    row-major order of taps; None where they never read two pixels at once. steps: distance of the pixels of a
    line, per axis.
    """

    steps: tuple[int, ...]
    parts: Mapping[Box, tuple[Box, ...]]
    pairs: Mapping[tuple[int, int], Box | None]

    @property
    def products(self) -> list[Box]:
        """Boxes that are multiplied."""
        return [box for box, parts in self.parts.items() if not parts]


@functools.lru_cache(maxsize=256)
def recipe(geometry: Geometry) -> Recipe:
    """Of a convolution, with its image's size."""
    pairs_of_axis = _pairs_of_transposed if geometry.transposed else _pairs_of_axis
    axes = [pairs_of_axis(geometry, axis) for axis in range(len(geometry.kernel))]
    steps = (1,) * len(axes) if geometry.transposed else geometry.stride
    hulls = [_hulls(lines.values(), step) for lines, step in zip(axes, steps, strict=True)]
    taps = list(itertools.product(*map(range, geometry.kernel)))
    parts: dict[Box, tuple[Box, ...]] = {}
    pairs: dict[tuple[int, int], Box | None] = {}
    for i, j in itertools.combinations_with_replacement(range(len(taps)), 2):
        box = Box(
            tuple(lines[pair] for lines, pair in zip(axes, zip(taps[i], taps[j], strict=True), strict=True))
        )
        pairs[i, j] = box if box.size else None
        if box.size:
            _explain(box, hulls, steps, parts)
    return Recipe(steps=steps, parts=parts, pairs=pairs)


def _pairs_of_axis(geometry: Geometry, axis: int) -> dict[tuple[int, int], Line]:
    """What two taps of one axis read where both are inside the image."""
    size, stride, outputs = geometry.space[axis], geometry.stride[axis], output_sizes(geometry)[axis]
    dilation, padding = geometry.dilation[axis], geometry.padding[axis]
    found = {}
    for pair in itertools.product(range(geometry.kernel[axis]), repeat=2):
        start, shift = dilation * pair[0] - padding, dilation * (pair[1] - pair[0])
        least, most = max(0, -shift), min(size, size - shift)
        first = max(0, -((start - least) // stride))  # the first output that reads both inside
        last = min(outputs - 1, (most - 1 - start) // stride)
        found[pair] = shift, start + stride * first, max(last - first + 1, 0)
    return found


def _pairs_of_transposed(geometry: Geometry, axis: int) -> dict[tuple[int, int], Line]:
    """The same where pixel u and tap k write output stride u + dilation k - padding."""
    size, stride, padding = geometry.space[axis], geometry.stride[axis], geometry.padding[axis]
    dilation, outputs = geometry.dilation[axis], output_sizes(geometry)[axis]
    found = {}
    for pair in itertools.product(range(geometry.kernel[axis]), repeat=2):
        start, (shift, apart) = dilation * pair[0] - padding, divmod(dilation * (pair[0] - pair[1]), stride)
        first = max(0, -shift, -(start // stride))
        last = min(size - 1, size - 1 - shift, (outputs - 1 - start) // stride)
        found[pair] = shift, first, 0 if apart else max(last - first + 1, 0)
    return found


def _hulls(lines: Iterable[Line], step: int) -> dict[Line, Line]:
    """Of every line, the line that covers it and all that it touches, of its shift and phase.

    What lies between lines that do not touch is read by no tap, and must not matter.
    """
    found: dict[Line, Line] = {}
    together: list[Line] = []
    filled = {line for line in lines if line[2]}
    for line in sorted(filled, key=lambda line: (line[0], line[1] % step, line[1])):
        near = together and line[0] == together[0][0] and line[1] <= _stop(together, step)
        alike = near and (line[1] - together[0][1]) % step == 0
        together = [*together, line] if alike else [line]
        shift, first, _ = together[0]
        found |= dict.fromkeys(together, (shift, first, (_stop(together, step) - first) // step))
    return found


def _stop(lines: Iterable[Line], step: int) -> int:
    """One step behind the last pixel of all."""
    return max(first + step * count for _, first, count in lines)


def _explain(
    box: Box,
    hulls: list[dict[Line, Line]],
    steps: tuple[int, ...],
    found: dict[Box, tuple[Box, ...]],
) -> None:
    """Note what the box is made of, and the same for its parts."""
    if box in found:
        return
    parts: tuple[Box, ...] = ()
    for axis, (line, step) in enumerate(zip(box.lines, steps, strict=True)):
        shift, first, count = line
        _, start, num = hulls[axis].get(line, line)
        before, after = (first - start) // step, num - count - (first - start) // step
        if 0 < before + after < count:
            slabs = ((shift, start, before), (shift, first + step * count, after))
            lines = [(shift, start, num), *(slab for slab in slabs if slab[2])]
            parts = tuple(_with_line(box, axis, line) for line in lines)
            break
    for part in parts:
        _explain(part, hulls, steps, found)
    found[box] = parts


def _with_line(box: Box, axis: int, line: Line) -> Box:
    return Box((*box.lines[:axis], line, *box.lines[axis + 1 :]))
