"""How the canonical gradient of a product becomes a parameter's gradient, and the geometry of
convolutions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Permute:
    """A layout step: `tensor.permute(dims)`."""

    dims: tuple[int, ...]


@final
@dataclass(frozen=True, kw_only=True)
class View:
    """A layout step: `tensor.reshape(after)` of a tensor of shape `before`."""

    before: tuple[int, ...]
    after: tuple[int, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the canonical gradient `[groups, d_out, d_in]` of a product becomes the parameter's gradient."""

    steps: tuple[Permute | View, ...]

    def to_parameter(self, matrix: Tensor) -> Tensor:
        """[groups, d_out, d_in] -> the parameter's shape."""
        for step in self.steps:
            matrix = matrix.permute(step.dims) if isinstance(step, Permute) else matrix.reshape(step.after)
        return matrix

    def to_matrix(self, gradient: Tensor) -> Tensor:
        """The parameter's shape -> [groups, d_out, d_in]."""
        for step in reversed(self.steps):
            if isinstance(step, Permute):
                inverse = [0] * len(step.dims)
                for position, dim in enumerate(step.dims):
                    inverse[dim] = position
                gradient = gradient.permute(inverse)
            else:
                gradient = gradient.reshape(step.before)
        return gradient


def simplified(steps: Iterable[Permute | View]) -> Layout:
    """The layout of these steps with adjacent permutations joined and steps without effect dropped."""
    kept: list[Permute | View] = []
    for step in steps:
        last = kept[-1] if kept else None
        if isinstance(step, Permute) and isinstance(last, Permute):
            kept[-1] = Permute(dims=tuple(last.dims[d] for d in step.dims))
        elif isinstance(step, View) and isinstance(last, View):
            kept[-1] = View(before=last.before, after=step.after)
        else:
            kept.append(step)
        if _no_effect(kept[-1]):
            kept.pop()
    return Layout(steps=tuple(kept))


def _no_effect(step: Permute | View) -> bool:
    if isinstance(step, Permute):
        return step.dims == tuple(range(len(step.dims)))
    return step.before == step.after


@final
@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Of a convolution: one entry per spatial axis. space: pixels of the input.

    Of a transposed convolution the kernel is stored mirrored.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    space: tuple[int, ...] = ()


def output_sizes(geometry: Geometry) -> tuple[int, ...]:
    """Output positions per axis, also of a transposed convolution."""
    reach = [d * (k - 1) + 1 for d, k in zip(geometry.dilation, geometry.kernel, strict=True)]
    axes = zip(geometry.space, geometry.stride, geometry.padding, reach, strict=True)
    if geometry.transposed:
        least = [(size - 1) * s + r - 2 * p for size, s, p, r in axes]
        return tuple(size + more for size, more in zip(least, geometry.output_padding, strict=True))
    return tuple((size + 2 * p - r) // s + 1 for size, s, p, r in axes)


def phase_geometry(geometry: Geometry) -> Geometry:
    """What remains of strides (without dilation) if the pixels of one phase are channels of a smaller image.

    Their positions modulo the stride; a kernel of ceil(K / stride) reads that image with stride 1.
    """
    taps = tuple(-(-k // s) for k, s in zip(geometry.kernel, geometry.stride, strict=True))
    space = tuple(o + t - 1 for o, t in zip(output_sizes(geometry), taps, strict=True))
    ones, zeros = (1,) * len(taps), (0,) * len(taps)
    return replace(geometry, kernel=taps, stride=ones, padding=zeros, space=space)


def lines_beyond(geometry: Geometry) -> list[int]:
    """How many outputs beyond each side of the grid still read pixels, per axis, with stride 1; also, how
    many lines of pixels they read. Not positive where the padding covers the kernel.
    """
    axes = zip(geometry.kernel, geometry.dilation, geometry.padding, geometry.space, strict=True)
    return [min(dilation * (kernel - 1) - padding, size) for kernel, dilation, padding, size in axes]


def along(geometry: Geometry, axes: Sequence[int], groups: int) -> Geometry:
    """The same along some axes alone, with other groups, stride 1 and no padding."""
    return Geometry(
        kernel=tuple(geometry.kernel[i] for i in axes),
        stride=(1,) * len(axes),
        padding=(0,) * len(axes),
        dilation=tuple(geometry.dilation[i] for i in axes),
        groups=groups,
        space=tuple(geometry.space[i] for i in axes),
    )


def lies_transposed(matrices: Tensor) -> bool:
    """Whether the rows of [..., m, n] are what lies side by side in memory."""
    m, n = matrices.shape[-2:]
    return m > 1 and n > 1 and matrices.stride(-2) == 1 and matrices.stride(-1) >= m
