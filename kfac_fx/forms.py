"""How the second moment of a convolution's patches is computed: the candidates, their costs, the choice.

Enters: a geometry, sizes. Leaves: names and plain numbers; no tensors. Costs are estimates of one core's
nanoseconds from rates measured on a CPU (`tests/benchmarks/gram_time.py`); only their ratios matter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, final

from kfac_fx.layout import Geometry, along, lines_beyond, output_sizes, phase_geometry

Form = Literal["pixels", "patches", "products", "transform", "convolution"]
Case = tuple[Geometry, int, int, str]  # geometry, examples, channels of all groups, type of device
LARGEST_PATCHES = 2.5

_PREFERRED: ContextVar[Mapping[Case, Form]] = ContextVar("preferred", default=MappingProxyType({}))
_PATCHES_ONLY: ContextVar[bool] = ContextVar("patches_only", default=False)
_MOST_CHUNKS = 16
_LARGEST_TABLE = 2**22


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


def choose(geometry: Geometry, *, examples: int, channels: int, device: str = "cpu") -> Cost:
    """The form that is `preferred` here, else the cheapest; by rows inside `patches_only`.

    channels: of the input, all groups. device: its type, as torch names it.
    """
    if _PATCHES_ONLY.get():
        return by_rows(geometry, examples=examples, channels=channels, device=device)
    found = costs(geometry, examples=max(examples, 1), channels=channels, device=device)
    wanted = _PREFERRED.get().get((geometry, examples, channels, device))
    return min(found, key=lambda cost: (cost.form != wanted, cost.time))


def by_rows(geometry: Geometry, *, examples: int, channels: int, device: str = "cpu") -> Cost:
    """Of patches, or pixels where the kernel is 1: what is left where some rows do not count."""
    form: Form = "patches" if math.prod(geometry.kernel) > 1 or geometry.transposed else "pixels"
    return _of_rows(form, geometry, max(examples, 1), channels, RATES.get(device, RATES["cpu"]))


@contextmanager
def preferred(forms: Mapping[Case, Form]) -> Iterator[None]:
    """Inside, `choose` takes these forms where they are possible: what was measured, say."""
    token = _PREFERRED.set(forms)
    try:
        yield
    finally:
        _PREFERRED.reset(token)


@contextmanager
def patches_only() -> Iterator[None]:
    """Inside, `choose` takes patches, or pixels where the kernel is 1: the plain way, for debugging."""
    token = _PATCHES_ONLY.set(True)
    try:
        yield
    finally:
        _PATCHES_ONLY.reset(token)


def costs(geometry: Geometry, *, examples: int, channels: int, device: str = "cpu") -> list[Cost]:
    """Every form for this geometry whose Gram matrices and patches stay below `LARGEST_PATCHES` images.

    If there is none, patches, of parts of single examples.
    """
    rates = RATES.get(device, RATES["cpu"])
    if math.prod(geometry.kernel) == 1 and not geometry.transposed:
        return [_of_rows("pixels", geometry, examples, channels, rates)]
    patches = _of_rows("patches", geometry, examples, channels, rates)
    strided = max(geometry.stride) > 1
    if geometry.transposed or (strided and max(geometry.dilation) > 1):
        return [patches]
    fits = patch_chunks(geometry) <= max(examples, 1)
    phases = 0.0  # pixels are padded, then sorted by their phase
    if strided:
        channels, geometry = channels * math.prod(geometry.stride), phase_geometry(geometry)
        phases = 2 * examples * channels * math.prod(geometry.space) * rates.move
    forms: tuple[Form, ...] = ("products",) if len(geometry.kernel) == 1 else ("transform", "convolution")
    found = [_of_autocorrelation(form, geometry, examples, channels, rates) for form in forms]
    found = [replace(cost, time=cost.time + phases) for cost in found]
    if _num_sources(geometry) * math.prod(geometry.kernel) ** 2 > _LARGEST_TABLE:
        found = []
    elif transform_chunks(geometry, examples, channels) > _MOST_CHUNKS:
        found = [cost for cost in found if cost.form != "transform"]
    return [patches, *found] if fits or not found else found


def patch_chunks(geometry: Geometry) -> int:
    """In how many parts of the batch patches are written."""
    return max(1, math.ceil(expansion(geometry) / LARGEST_PATCHES))


def product_chunks(geometry: Geometry, examples: int, share: float) -> int:
    """In how many parts of the batch lines are moved by all offsets. share: of the image, that they are."""
    return max(1, min(examples, math.ceil(share * (2 * geometry.kernel[0] - 1) / LARGEST_PATCHES)))


def transform_chunks(geometry: Geometry, examples: int, channels: int) -> int:
    """In how many parts frequencies are summed, so that their Gram matrices are no larger than patches."""
    frequencies = math.prod(num_frequencies(periods_without_wrap(geometry)))
    per_image = frequencies * (channels // geometry.groups) / (examples * math.prod(geometry.space))
    return max(1, math.ceil(per_image / LARGEST_PATCHES))


def expansion(geometry: Geometry) -> float:
    """Elements of all patches relative to those of the image."""
    if geometry.transposed:
        return float(math.prod(geometry.kernel) * math.prod(geometry.stride))
    return math.prod(output_sizes(geometry)) * math.prod(geometry.kernel) / math.prod(geometry.space)


def edge_subsets(geometry: Geometry) -> list[tuple[int, ...]]:
    """Sets of axes along which outputs beyond the grid read pixels; stride 1. The empty set comes first."""
    edged = [axis for axis, lines in enumerate(lines_beyond(geometry)) if lines > 0]
    return [axes for size in range(len(edged) + 1) for axes in itertools.combinations(edged, size)]


def _num_sources(geometry: Geometry) -> int:
    """Matrices that every pair of taps is a sum of."""
    beyond, total = lines_beyond(geometry), 0
    for axes in edge_subsets(geometry):
        lines = math.prod(2 * beyond[axis] ** 2 for axis in axes)
        total += lines * math.prod(2 * k - 1 for axis, k in enumerate(geometry.kernel) if axis not in axes)
    return total


def _of_rows(form: Form, geometry: Geometry, examples: int, channels: int, rates: Rates) -> Cost:
    """One product of all rows with themselves; patches have to be written first."""
    rows = examples * (expansion(geometry) / math.prod(geometry.kernel)) * math.prod(geometry.space)
    features = channels // geometry.groups * math.prod(geometry.kernel)
    flops = round(2 * rows * geometry.groups * features**2)
    copied = rows * geometry.groups * features * rates.copy if form == "patches" else 0.0
    return Cost(form=form, flops=flops, time=flops / rates.fast + copied + rates.few)


def _of_autocorrelation(form: Form, geometry: Geometry, examples: int, channels: int, rates: Rates) -> Cost:
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
    pairs, sources = channels**2 // geometry.groups, _num_sources(geometry)
    table = 2 * pairs * sources * volume**2
    time += table / rates.slow + pairs * (volume**2 + sources) * rates.write
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
