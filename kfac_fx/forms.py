"""How the second moment of a convolution's patches is computed: the candidates, their costs, the choice.

Enters: a geometry, sizes. Leaves: names and plain numbers; no tensors. Costs are estimates of one core's
nanoseconds from rates measured on a CPU (`tests/benchmarks/gram_time.py`); only their ratios matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

from kfac_fx.layout import Geometry, output_sizes, phase_geometry

Form = Literal["pixels", "patches", "products", "transform", "convolution"]
LARGEST_PATCHES = 2.5

_FAST, _SLOW = 70.0, 40.0  # FLOPs per nanosecond: of one large product, of many small ones
_COPY, _GATHER, _EDGE, _CALL = 9.0, 3.5, 1.5, 500.0  # nanoseconds per element; per small product
_WORDS = {
    "pixels": "pixels^T pixels",
    "patches": "patches^T patches",
    "products": "autocorrelation by products",
    "transform": "autocorrelation by Fourier transform",
    "convolution": "autocorrelation by convolution",
}


@final
@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one form. flops: floating point operations, a multiply-add counts 2. time: estimated nanoseconds."""

    form: Form
    flops: int
    time: float


def words(form: Form, geometry: Geometry) -> str:
    """The form in words, for reports."""
    of_phases = form not in ("pixels", "patches") and max(geometry.stride) > 1
    return _WORDS[form] + (" of phases" if of_phases else "")


def choose(geometry: Geometry, *, examples: int, channels: int) -> Cost:
    """The cheapest form. channels: of the input, all groups."""
    return min(costs(geometry, examples=examples, channels=channels), key=lambda cost: cost.time)


def costs(geometry: Geometry, *, examples: int, channels: int) -> list[Cost]:
    """Every form for this geometry.

    Patches larger than `LARGEST_PATCHES` images are a candidate only where there is no other.
    """
    if math.prod(geometry.kernel) == 1 and not geometry.transposed:
        return [_of_rows("pixels", geometry, examples, channels)]
    strided = max(geometry.stride) > 1
    patches = _of_rows("patches", geometry, examples, channels)
    if geometry.transposed or (strided and max(geometry.dilation) > 1):
        return [patches]
    small = expansion(geometry) <= LARGEST_PATCHES
    if strided:
        channels, geometry = channels * math.prod(geometry.stride), phase_geometry(geometry)
    forms: tuple[Form, ...] = ("products",) if len(geometry.kernel) == 1 else ("transform", "convolution")
    found = [_of_autocorrelation(form, geometry, examples, channels) for form in forms]
    return [patches, *found] if small else found


def expansion(geometry: Geometry) -> float:
    """Elements of all patches relative to those of the image."""
    if geometry.transposed:
        return float(math.prod(geometry.kernel) * math.prod(geometry.stride))
    return math.prod(output_sizes(geometry)) * math.prod(geometry.kernel) / math.prod(geometry.space)


def _of_rows(form: Form, geometry: Geometry, examples: int, channels: int) -> Cost:
    """One product of all rows with themselves; patches have to be written first."""
    rows = examples * (expansion(geometry) / math.prod(geometry.kernel)) * math.prod(geometry.space)
    features = channels // geometry.groups * math.prod(geometry.kernel)
    flops = round(2 * rows * geometry.groups * features**2)
    copied = rows * geometry.groups * features * _COPY if form == "patches" else 0.0
    return Cost(form=form, flops=flops, time=flops / _FAST + copied)


def _of_autocorrelation(form: Form, geometry: Geometry, examples: int, channels: int) -> Cost:
    """Stride 1: lags, their spreading over A, and strips at the edges."""
    if not geometry.kernel:
        flops = 2 * examples * channels**2 // geometry.groups
        return Cost(form=form, flops=flops, time=flops / _SLOW)
    name: Form = "products" if len(geometry.kernel) == 1 else form
    lags = {"products": _products, "convolution": _convolution, "transform": _transform}[name]
    flops, time = lags(geometry, examples, channels)
    elements = geometry.groups * (channels // geometry.groups * math.prod(geometry.kernel)) ** 2
    time += _GATHER * elements
    for axis, (k, d, p) in enumerate(zip(geometry.kernel, geometry.dilation, geometry.padding, strict=True)):
        beyond = d * (k - 1) - p
        if beyond <= 0:
            continue
        strip = _of_autocorrelation(
            form, _without(geometry, axis), examples * beyond, channels * (k - (p + 1 + d - 1) // d)
        )
        flops, time = flops + 2 * strip.flops, time + 2 * (strip.time + _EDGE * elements)
    return Cost(form=form, flops=flops, time=time)


def _without(geometry: Geometry, axis: int) -> Geometry:
    def others(values: Sequence[int]) -> tuple[int, ...]:
        return (*values[:axis], *values[axis + 1 :])

    return replace(
        geometry,
        kernel=others(geometry.kernel),
        stride=others(geometry.stride),
        padding=others(geometry.padding),
        dilation=others(geometry.dilation),
        space=others(geometry.space),
    )


def _num_offsets(kernel: Sequence[int]) -> int:
    return kernel[0] * math.prod(2 * k - 1 for k in kernel[1:])


def _products(geometry: Geometry, examples: int, channels: int) -> tuple[int, float]:
    flops = 2 * examples * geometry.space[0] * geometry.kernel[0] * channels**2 // geometry.groups
    return flops, flops / _SLOW + geometry.kernel[0] * geometry.groups * _CALL


def _convolution(geometry: Geometry, examples: int, channels: int) -> tuple[int, float]:
    pixels = examples * math.prod(geometry.space)
    flops = 2 * _num_offsets(geometry.kernel) * pixels * channels**2 // geometry.groups
    return flops, flops / _SLOW


def _transform(geometry: Geometry, examples: int, channels: int) -> tuple[int, float]:
    periods = periods_without_wrap(geometry)
    sizes, space = num_frequencies(periods), geometry.space
    transforms = 4 * examples * channels * math.prod(space[:-1]) * space[-1] * sizes[-1]
    for axis in range(len(space) - 1):
        rest = math.prod(space[:axis]) * math.prod(sizes[axis + 1 :])
        transforms += 8 * examples * channels * rest * space[axis] * sizes[axis]
    frequencies, entries = math.prod(sizes), channels**2 // geometry.groups
    grams = 6 * examples * frequencies * entries
    back = 4 * _num_offsets(geometry.kernel) * frequencies * entries
    calls = 3 * frequencies * geometry.groups * _CALL
    return transforms + grams + back, (transforms + grams) / _SLOW + back / _FAST + calls


def periods_without_wrap(geometry: Geometry) -> list[int]:
    """Length of the Fourier transform per axis: the image and the widest offset."""
    axes = zip(geometry.space, geometry.dilation, geometry.kernel, strict=True)
    return [size + dilation * (kernel - 1) for size, dilation, kernel in axes]


def num_frequencies(periods: Sequence[int]) -> list[int]:
    """Frequencies per axis; of the last one half, since images are real."""
    return [*periods[:-1], periods[-1] // 2 + 1]
