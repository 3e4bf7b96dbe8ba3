"""Second moments of patches without the patches, against patches that torch's own convolution extracts.

A kernel of ones at single places copies what a convolution reads there, whatever its geometry.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kfac_fx.autocorrelation import patch_moment
from kfac_fx.forms import LARGEST_PATCHES, choose, costs, expansion
from kfac_fx.layout import Geometry

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


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


@settings(deadline=None, max_examples=120, derandomize=True)
@given(convolutions())
def test_every_form_of_every_geometry_gives_the_gram_matrix_of_the_patches(
    case: tuple[Geometry, int, int],
) -> None:
    geometry, examples, channels = case
    x = torch.randn(examples, channels, *geometry.space, dtype=torch.float64)
    rows = copied_patches(x, geometry)
    for cost in costs(geometry, examples=examples, channels=channels):
        moment = patch_moment(x, geometry, cost.form)
        assert (moment - rows.mT @ rows).abs().max() <= 1e-12 * (x * x).sum(), cost.form


@pytest.mark.parametrize("form", ["transform", "convolution"])
def test_in_float32_both_ways_to_the_lags_are_as_exact_as_a_product_of_patches(form: Any) -> None:
    torch.manual_seed(0)
    geometry = image(3, 1, 1, size=32)
    x = torch.randn(16, 32, 32, 32)
    rows = copied_patches(x.double(), geometry)
    exact = rows.mT @ rows
    error = (patch_moment(x, geometry, form).double() - exact).abs().max() / exact.abs().max()
    assert error < (2e-6 if form == "transform" else 5e-5)


def image(kernel: int, stride: int, padding: int, *, size: int) -> Geometry:
    return Geometry(
        kernel=(kernel, kernel),
        stride=(stride, stride),
        padding=(padding, padding),
        dilation=(1, 1),
        groups=1,
        space=(size, size),
    )


def test_no_chosen_form_writes_patches_that_dwarf_the_image() -> None:
    for kernel, stride, size in [(3, 1, 32), (7, 2, 224), (5, 2, 28), (11, 4, 224), (3, 1, 7)]:
        geometry = image(kernel, stride, kernel // 2, size=size)
        assert expansion(geometry) > LARGEST_PATCHES
        assert choose(geometry, examples=8, channels=16).form in ("transform", "convolution")
    assert choose(image(1, 1, 0, size=32), examples=8, channels=16).form == "pixels"


def test_flops_of_a_plain_product_are_two_per_entry_and_row() -> None:
    geometry = image(3, 2, 1, size=16)
    patches = next(c for c in costs(geometry, examples=4, channels=6) if c.form == "patches")
    assert patches.flops == 2 * 4 * 64 * 54**2
