"""Second moments of patches without the patches, against patches that torch's own convolution extracts.

A kernel of ones at single places copies what a convolution reads there, whatever its geometry.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_fx.autocorrelation import input_moment, patch_moment
from kfac_fx.forms import LARGEST_PATCHES, choose, costs
from kfac_fx.layout import Geometry, output_sizes
from kfac_fx.windows import position_sums

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def line(kernel: int, *, stride: int, padding: int, dilation: int, size: int) -> Geometry:
    return Geometry(
        kernel=(kernel,),
        stride=(stride,),
        padding=(padding,),
        dilation=(dilation,),
        groups=1,
        space=(size,),
    )


def copied_patches(x: Tensor, geometry: Geometry) -> Tensor:
    """[groups, N * T, C/groups * K]."""
    channels, volume = x.shape[1] // geometry.groups, math.prod(geometry.kernel)
    copies = torch.eye(channels * volume, dtype=x.dtype).reshape(-1, channels, *geometry.kernel)
    groups = []
    for part in x.chunk(geometry.groups, 1):
        read = CONVOLUTIONS[len(geometry.kernel)](
            part,
            copies,
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
        )
        groups.append(read.flatten(2).transpose(1, 2).reshape(-1, channels * volume))
    return torch.stack(groups)


def copied_patches_of_transposed(x: Tensor, geometry: Geometry) -> Tensor:
    """[groups, N * T, C/groups * K]: every pixel times every tap, where torch writes it."""
    channels, volume = x.shape[1] // geometry.groups, math.prod(geometry.kernel)
    copies = torch.eye(channels * volume, dtype=x.dtype).reshape(
        channels * volume, channels, *geometry.kernel
    )
    groups = []
    for part in x.chunk(geometry.groups, 1):
        written = TRANSPOSED[len(geometry.kernel)](
            part,
            copies.transpose(0, 1),
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            output_padding=geometry.output_padding,
        )
        groups.append(written.flatten(2).transpose(1, 2).reshape(-1, channels * volume))
    return torch.stack(groups)


@st.composite
def transposed_convolutions(draw: Any) -> tuple[Geometry, int, int]:
    """The same of a transposed one."""
    rank = draw(st.integers(1, 3))

    def per_axis(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in range(rank))

    kernel, stride, dilation, space = per_axis(1, 4), per_axis(1, 3), per_axis(1, 2), per_axis(1, 5)
    output_padding = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    axes = list(zip(kernel, stride, dilation, space, output_padding, strict=True))
    outputs = [(size - 1) * s + d * (k - 1) + o + 1 for k, s, d, size, o in axes]
    padding = tuple(draw(st.integers(0, min(3, (size - 1) // 2))) for size in outputs)
    groups = draw(st.integers(1, 2))
    geometry = Geometry(
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        space=space,
        transposed=True,
        output_padding=output_padding,
    )
    return geometry, draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))


@st.composite
def convolutions(draw: Any) -> tuple[Geometry, int, int]:
    """A geometry that has an output, examples and channels."""
    rank = draw(st.integers(1, 3))

    def per_axis(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in range(rank))

    kernel, stride, dilation, padding = per_axis(1, 4), per_axis(1, 3), per_axis(1, 2), per_axis(0, 4)
    axes = zip(kernel, dilation, padding, strict=True)
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in axes]
    space = tuple(size + draw(st.integers(0, 5)) for size in least)
    groups = draw(st.integers(1, 2))
    geometry = Geometry(
        kernel=kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, space=space
    )
    return geometry, draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))


def what_it_reads(x: Tensor, geometry: Geometry) -> Tensor:
    """[groups, N * T, C/groups * K], by torch's own convolutions."""
    return (copied_patches_of_transposed if geometry.transposed else copied_patches)(x, geometry)


@settings(deadline=None, max_examples=220, derandomize=True)
@given(st.one_of(convolutions(), transposed_convolutions()))
def test_every_form_of_every_geometry_gives_the_gram_matrix_of_the_patches(
    case: tuple[Geometry, int, int],
) -> None:
    geometry, examples, channels = case
    x = torch.randn(examples, channels, *geometry.space, dtype=torch.float64)
    rows = what_it_reads(x, geometry)
    for cost in costs(geometry, examples=examples, channels=channels):
        moment = patch_moment(x, geometry, cost.form)
        assert (moment - rows.mT @ rows).abs().max() <= 1e-12 * (x * x).sum(), cost.form


def read_pixels(geometry: Geometry) -> Tensor:
    """Whether some patch holds the pixel: [*space]."""
    pixels = torch.arange(1.0, math.prod(geometry.space) + 1, dtype=torch.float64).reshape(geometry.space)
    image = pixels.expand(1, geometry.groups, *geometry.space)
    return torch.isin(pixels, what_it_reads(image, geometry))


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.one_of(convolutions(), transposed_convolutions()))
@example((line(3, stride=1, padding=9, dilation=13, size=20), 2, 2))
@example((line(5, stride=3, padding=6, dilation=4, size=13), 2, 2))
def test_what_no_patch_reads_does_not_matter(case: tuple[Geometry, int, int]) -> None:
    geometry, examples, channels = case
    x = torch.randn(examples, channels, *geometry.space, dtype=torch.float64)
    for cost in costs(geometry, examples=examples, channels=channels):
        moment = patch_moment(x, geometry, cost.form)
        wild = patch_moment(x.masked_fill(~read_pixels(geometry), torch.nan), geometry, cost.form)
        torch.testing.assert_close(wild, moment, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
def test_patches_of_parts_of_an_example_are_all_its_patches(stride: tuple[int, int]) -> None:
    geometry = replace(image(9, 1, 4, size=13), stride=stride, groups=2)
    x = torch.randn(2, 4, 13, 13, dtype=torch.float64)
    rows = copied_patches(x, geometry)
    found = patch_moment(x, geometry, "patches")
    assert (found - rows.mT @ rows).abs().max() <= 1e-12 * (x * x).sum()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(convolutions())
def test_box_sums_are_the_sums_of_the_patches(case: tuple[Geometry, int, int]) -> None:
    geometry, examples, channels = case
    x = torch.randn(examples, channels, *geometry.space, dtype=torch.float64)
    found = position_sums(x, geometry, ones=True)
    rows = copied_patches(x, geometry).unflatten(1, (examples, -1))
    assert found.positions == rows.shape[2]
    torch.testing.assert_close(found.sums, rows.sum(2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["transform", "convolution"])
def test_in_float32_both_ways_to_the_lags_are_as_exact_as_a_product_of_patches(form: Any) -> None:
    torch.manual_seed(0)
    geometry = image(3, 1, 1, size=32)
    x = torch.randn(16, 32, 32, 32)
    rows = copied_patches(x.double(), geometry)
    exact = rows.mT @ rows
    error = (patch_moment(x, geometry, form).double() - exact).abs().max() / exact.abs().max()
    assert error < (2e-6 if form == "transform" else 5e-5)


def test_the_moment_of_a_use_counts_its_rows_and_adds_them_up() -> None:
    geometry = image(3, 2, 1, size=9)
    x = torch.randn(4, 6, 9, 9, dtype=torch.float64)
    found = input_moment(x, geometry, form="patches", ones=True)
    rows = copied_patches(x, geometry)
    assert found.count == rows.shape[1] == 4 * math.prod(output_sizes(geometry))
    torch.testing.assert_close(found.total, rows.sum(1), rtol=1e-12, atol=1e-12)


def image(kernel: int, stride: int, padding: int, *, size: int) -> Geometry:
    return Geometry(
        kernel=(kernel, kernel),
        stride=(stride, stride),
        padding=(padding, padding),
        dilation=(1, 1),
        groups=1,
        space=(size, size),
    )


@pytest.mark.parametrize(
    ("kernel", "stride", "size", "examples", "channels"),
    [
        (3, 1, 32, 4, 16),
        (3, 1, 7, 2, 64),
        (3, 2, 32, 4, 16),
        (7, 2, 64, 16, 3),
        (5, 2, 28, 8, 4),
        (11, 4, 64, 16, 3),
    ],
)
def test_no_form_holds_more_than_two_and_a_half_images_or_the_factor(
    kernel: int, stride: int, size: int, examples: int, channels: int
) -> None:
    """Every tensor is looked at as it is made."""
    geometry = image(kernel, stride, kernel // 2, size=size)
    x = torch.randn(examples, channels, size, size)
    padded = x.numel() * (1 + (2 * (kernel // 2) + stride) / size) ** 2
    factor = (channels * kernel**2) ** 2
    for cost in costs(geometry, examples=examples, channels=channels):
        with Largest() as largest:
            patch_moment(x, geometry, cost.form)
        assert largest.numel <= max(LARGEST_PATCHES * padded, factor), cost.form


class Largest(TorchDispatchMode):
    """The number of elements of the largest result inside."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it and look."""
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and not func.is_view:
            self.numel = max(self.numel, found.numel())
        return found


def test_one_pixel_kernels_are_plain_products_of_pixels() -> None:
    assert choose(image(1, 1, 0, size=32), examples=8, channels=16).form == "pixels"


def test_flops_of_a_plain_product_are_two_per_entry_and_row() -> None:
    geometry = image(3, 2, 1, size=16)
    patches = next(c for c in costs(geometry, examples=4, channels=6) if c.form == "patches")
    assert patches.flops == 2 * 4 * 64 * 54**2
