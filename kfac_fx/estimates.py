"""What each way to compute the second moment of a convolution's patches costs: FLOPs and estimated time.

Enters: a geometry, sizes, the rates of a device. Leaves: plain numbers; no tensors. Times are estimates of
one core's nanoseconds from rates measured on a CPU (`tests/benchmarks/gram_time.py`); only their ratios
matter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from kfac_fx.boxes import recipe
from kfac_fx.layout import Geometry, along, lines_beyond, output_sizes

Form = Literal["pixels", "patches", "products", "shifts", "transform", "convolution"]
_MOST_TAPS, _MOST_BOXES = 27, 48  # more make long programs


@final
@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device does, in nanoseconds and FLOPs per nanosecond.

    fast, slow: FLOPs of one large product, of many small ones. copy, move, write: per element of patches, of
    an image whose axes are reordered, of a factor. call: per small product. few, many: operators of a form
    by rows, of one by autocorrelation.
    """

    fast: float
    slow: float
    copy: float
    move: float
    write: float
    call: float
    few: float
    many: float


# One core of a server's CPU, fitted to the times of tests/benchmarks/gram_time.py. CUDA: from data sheets
# (50 TFLOP/s in float32, 2 TB/s, 3 microseconds per kernel), not measured; `bench --autotune` measures.
RATES = {
    "cpu": Rates(fast=90, slow=40, copy=7, move=2, write=2, call=500, few=2e5, many=1e6),
    "cuda": Rates(fast=3e4, slow=1e4, copy=0.01, move=0.01, write=0.01, call=10, few=3e4, many=3e5),
}


@final
@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one form. flops: floating point operations, a multiply-add counts 2. time: estimated nanoseconds."""

    form: Form
    flops: int
    time: float


def expansion(geometry: Geometry) -> float:
    """Elements of all patches relative to those of the image."""
    return math.prod(output_sizes(geometry)) * math.prod(geometry.kernel) / math.prod(geometry.space)


def edge_subsets(geometry: Geometry) -> list[tuple[int, ...]]:
    """Sets of axes along which outputs beyond the grid read pixels; stride 1. The empty set comes first."""
    edged = [axis for axis, lines in enumerate(lines_beyond(geometry)) if lines > 0]
    return [axes for size in range(len(edged) + 1) for axes in itertools.combinations(edged, size)]


def num_sources(geometry: Geometry) -> int:
    """Matrices that every pair of taps is a sum of."""
    beyond, total = lines_beyond(geometry), 0
    for axes in edge_subsets(geometry):
        lines = math.prod(2 * beyond[axis] ** 2 for axis in axes)
        total += lines * math.prod(2 * k - 1 for axis, k in enumerate(geometry.kernel) if axis not in axes)
    return total


def of_rows(form: Form, geometry: Geometry, examples: int, channels: int, rates: Rates) -> Cost:
    """One product of all rows with themselves; patches have to be written first."""
    rows = examples * (expansion(geometry) / math.prod(geometry.kernel)) * math.prod(geometry.space)
    features = channels // geometry.groups * math.prod(geometry.kernel)
    flops = round(2 * rows * geometry.groups * features**2)
    copied = rows * geometry.groups * features * rates.copy if form == "patches" else 0.0
    return Cost(form=form, flops=flops, time=flops / rates.fast + copied + rates.few)


def of_shifts(geometry: Geometry, examples: int, channels: int, rates: Rates) -> list[Cost]:
    """Products of boxes of pixels, copied in rows, and two copies of all pairs of taps; none if too many."""
    volume, entries = math.prod(geometry.kernel), channels**2 // geometry.groups
    if volume > _MOST_TAPS:
        return []
    found = recipe(geometry)
    boxes, sums = found.products, sum(max(len(parts) - 1, 0) for parts in found.parts.values())
    if len(boxes) > _MOST_BOXES:
        return []
    pixels = examples * sum(box.size for box in boxes)
    flops = 2 * pixels * entries
    image = examples * math.prod(geometry.space)
    moved = (1.25 * pixels + image) * channels * rates.move  # boxes lie in order, one or two copies
    written = (2 * volume**2 + 2 * sums) * entries * rates.write / 2
    calls = len(boxes) * geometry.groups * rates.call
    time = flops / rates.fast + moved + written + calls + rates.many * len(boxes) / 10
    return [Cost(form="shifts", flops=flops, time=time)]


def of_autocorrelation(form: Form, geometry: Geometry, examples: int, channels: int, rates: Rates) -> Cost:
    """Stride 1: lags of the image and of its edges, and the product that gives every pair of taps."""
    volume, beyond, rank = math.prod(geometry.kernel), lines_beyond(geometry), len(geometry.kernel)
    flops, time = 0, rates.many
    for axes in edge_subsets(geometry):
        sides, lines = 2 ** len(axes), math.prod(beyond[axis] for axis in axes)
        kept = [axis for axis in range(rank) if axis not in axes]
        part = along(geometry, kept, geometry.groups * sides)
        lags = {0: _no_lags, 1: _products}.get(len(kept), _transform if form == "transform" else _convolution)
        more = lags(part, examples, channels * sides * lines, rates)
        flops, time = flops + more[0], time + more[1]
    pairs, sources = channels**2 // geometry.groups, num_sources(geometry)
    table = 2 * pairs * sources * volume**2
    time += table / rates.slow + 2 * pairs * (volume**2 + sources) * rates.write
    return Cost(form=form, flops=flops + table, time=time)


def _no_lags(geometry: Geometry, examples: int, channels: int, rates: Rates) -> tuple[int, float]:
    flops = 2 * examples * channels**2 // geometry.groups
    return flops, flops / rates.slow + geometry.groups * rates.call


def _products(geometry: Geometry, examples: int, channels: int, rates: Rates) -> tuple[int, float]:
    pixels, kernel = examples * geometry.space[0], geometry.kernel[0]
    flops = 2 * pixels * (2 * kernel - 1) * channels**2 // geometry.groups
    moved = pixels * 2 * kernel * channels * rates.move
    return flops, flops / rates.fast + geometry.groups * rates.call + moved


def _convolution(geometry: Geometry, examples: int, channels: int, rates: Rates) -> tuple[int, float]:
    pixels, per_group = examples * math.prod(geometry.space), channels // geometry.groups
    offsets = geometry.kernel[0] * math.prod(2 * k - 1 for k in geometry.kernel[1:])
    flops = 2 * offsets * pixels * channels * per_group
    share = 0.4 if geometry.groups > 1 else 1.0  # of the speed without groups
    return flops, flops / (1.4 * share * rates.slow * per_group / (per_group + 20))


def _transform(geometry: Geometry, examples: int, channels: int, rates: Rates) -> tuple[int, float]:
    periods = periods_without_wrap(geometry)
    sizes, space = num_frequencies(periods), geometry.space
    transforms = 4 * examples * channels * math.prod(space[:-1]) * space[-1] * sizes[-1]
    for axis in range(len(space) - 1):
        rest = math.prod(space[:axis]) * math.prod(sizes[axis + 1 :])
        transforms += 8 * examples * channels * rest * space[axis] * sizes[axis]
    frequencies, entries = math.prod(sizes), channels**2 // geometry.groups
    grams = 6 * examples * frequencies * entries
    offsets = math.prod(2 * k - 1 for k in geometry.kernel)
    back = 4 * offsets * frequencies * entries
    moved = examples * channels * math.prod(space) * rates.move
    written = (2 * frequencies + offsets) * entries * rates.write / 2
    calls = 2 * frequencies * geometry.groups * rates.call
    time = (transforms + grams) / rates.slow + back / rates.fast + calls + moved + written
    return transforms + grams + back, time


def periods_without_wrap(geometry: Geometry) -> list[int]:
    """Length of the Fourier transform per axis: the image and the widest offset."""
    axes = zip(geometry.space, geometry.dilation, geometry.kernel, strict=True)
    return [size + dilation * (kernel - 1) for size, dilation, kernel in axes]


def num_frequencies(periods: Sequence[int]) -> list[int]:
    """Frequencies per axis; of the last one half, since images are real."""
    return [*periods[:-1], periods[-1] // 2 + 1]
