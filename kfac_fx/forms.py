"""How the second moment of a convolution's patches is computed: the candidates and the choice.

Enters: a geometry, sizes. Leaves: names and plain numbers; no tensors. What a candidate costs is estimated in
`estimates`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from types import MappingProxyType

from kfac_fx.estimates import (
    RATES,
    Cost,
    Form,
    Rates,
    expansion,
    num_frequencies,
    num_sources,
    of_autocorrelation,
    of_rows,
    of_shifts,
    periods_without_wrap,
)
from kfac_fx.layout import Geometry, output_sizes, phase_geometry

Case = tuple[Geometry, int, int, str]  # geometry, examples, channels of all groups, type of device
LARGEST_PATCHES = 2.5

_PREFERRED: ContextVar[Mapping[Case, Form]] = ContextVar("preferred", default=MappingProxyType({}))
_PATCHES_ONLY: ContextVar[bool] = ContextVar("patches_only", default=False)
_MOST_CHUNKS = 16
_LARGEST_TABLE = 2**22


_WORDS = {
    "pixels": "pixels^T pixels",
    "patches": "patches^T patches",
    "products": "autocorrelation by products",
    "shifts": "products of shifted images",
    "transform": "autocorrelation by Fourier transform",
    "convolution": "autocorrelation by convolution",
}


def words(form: Form, geometry: Geometry) -> str:
    """The form in words, for reports."""
    of_phases = form not in ("pixels", "patches", "shifts") and max(geometry.stride) > 1
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
    return of_rows(form, geometry, max(examples, 1), channels, RATES.get(device, RATES["cpu"]))


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
        return [of_rows("pixels", geometry, examples, channels, rates)]
    patches = of_rows("patches", geometry, examples, channels, rates)
    fits = patch_chunks(geometry) <= max(examples, 1)
    shifts = of_shifts(geometry, examples, channels, rates)
    if geometry.transposed or (max(geometry.stride) > 1 and max(geometry.dilation) > 1):
        return [patches, *shifts] if fits or not shifts else shifts
    found = [*_autocorrelations(geometry, examples, channels, rates), *shifts]
    return [patches, *found] if fits or not found else found


def _autocorrelations(geometry: Geometry, examples: int, channels: int, rates: Rates) -> list[Cost]:
    """Those forms that are possible: they read each pixel of the image, so each must be in some patch."""
    pixels, image, phases = math.prod(geometry.space), geometry, 0.0
    if max(geometry.stride) > 1:  # pixels are padded, then sorted by their phase
        image = phase_geometry(geometry)
        per_pixel = math.prod(geometry.stride) * math.prod(image.space) / pixels
        phases = 2 * examples * channels * per_pixel * pixels * rates.move
        if per_pixel > LARGEST_PATCHES:
            return []
        channels *= math.prod(geometry.stride)
    apart = zip(output_sizes(image), image.dilation, image.kernel, strict=True)
    large = num_sources(image) * math.prod(image.kernel) ** 2 > _LARGEST_TABLE
    if large or any(outputs < dilation and kernel > 1 for outputs, dilation, kernel in apart):
        return []
    periods = periods_without_wrap(image)
    wide = [period / size for period, size in zip(periods, image.space, strict=True)]
    fits: dict[Form, bool] = {
        "products": 2 * wide[0] - 1 <= LARGEST_PATCHES * product_chunks(image, examples, 1.0),
        "transform": transform_chunks(image, examples, channels) <= _MOST_CHUNKS,
        "convolution": wide[0] <= LARGEST_PATCHES,
    }
    forms: tuple[Form, ...] = ("products",) if len(image.kernel) == 1 else ("transform", "convolution")
    found = [of_autocorrelation(form, image, examples, channels, rates) for form in forms if fits[form]]
    return [replace(cost, time=cost.time + phases) for cost in found]


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
