"""Products of float32 in float32 on CUDA: not in TF32, whatever the user allows for the model.

TF32 rounds operands to 10 bits, which hides the small eigenvalues of a factor, and convolutions use it by
default (pitfall P6 of methods.md). Leaves: a context for what runs eagerly, and torch's products as operators
that switch it off around themselves, for programs. Flags are the host's, for all of its threads: TF32 is off
while any thread is inside a context. A CUDA graph keeps the flags of its recording.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Products of float32 matrices, and convolutions, in float32. On a CPU nothing changes."""
    if device.type != "cuda":
        yield
        return
    with _lock:
        _open.append(_open[0] if _open else _allowed())
    try:
        with _lock:
            torch.set_float32_matmul_precision("highest")  # torch refuses to read flags that disagree
            matmul, conv, _ = _backends()
            matmul.fp32_precision = conv.fp32_precision = "ieee"
        yield
    finally:
        with _lock:
            legacy, precisions = _open.pop()
            if not _open:
                torch.set_float32_matmul_precision(legacy)
                for backend, precision in zip(_backends(), precisions, strict=True):
                    backend.fp32_precision = precision


# An entry per open context, of whatever thread. All hold what was allowed before the first of them.
_open: list[tuple[str, tuple[str, ...]]] = []
_lock = threading.Lock()


def _backends() -> tuple[Any, Any, Any]:
    """Where the newer flags are, for each kind of product that TF32 can be in."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    return cuda.matmul, cudnn.conv, mkldnn.matmul  # type: ignore[attr-defined]


def _allowed() -> tuple[str, tuple[str, ...]]:
    """The flags as they are: the older one, and those of `_backends`."""
    return _legacy(), tuple(backend.fp32_precision for backend in _backends())


def _legacy() -> str:
    """The older flag, for all backends; it cannot be read where the newer ones allow something else."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "highest"


@torch.library.custom_op("kfac_fx::mm", mutates_args=())
def mm(left: Tensor, right: Tensor) -> Tensor:
    """aten.mm in full float32."""
    with full_float32(left.device):
        return aten.mm(left, right)


@torch.library.custom_op("kfac_fx::bmm", mutates_args=())
def bmm(left: Tensor, right: Tensor) -> Tensor:
    """aten.bmm in full float32."""
    with full_float32(left.device):
        return aten.bmm(left, right)


@torch.library.custom_op("kfac_fx::addmm", mutates_args=())
def addmm(added: Tensor, left: Tensor, right: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """aten.addmm in full float32."""
    with full_float32(left.device):
        return aten.addmm(added, left, right, beta=beta, alpha=alpha)


@torch.library.custom_op("kfac_fx::baddbmm", mutates_args=())
def baddbmm(added: Tensor, left: Tensor, right: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """aten.baddbmm in full float32."""
    with full_float32(left.device):
        return aten.baddbmm(added, left, right, beta=beta, alpha=alpha)


@torch.library.custom_op("kfac_fx::convolution_weight", mutates_args=())
def convolution_weight(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """The weight's gradient of aten.convolution_backward in full float32."""
    geometry = stride, padding, dilation, transposed, output_padding, groups
    mask = [False, True, False]
    with full_float32(x.device):
        return aten.convolution_backward(gradient, x, weight, bias_sizes, *geometry, mask)[1]


@mm.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return aten.mm(left, right)


@bmm.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return aten.bmm(left, right)


@addmm.register_fake
def _(added: Tensor, left: Tensor, right: Tensor, **scales: float) -> Tensor:
    return aten.addmm(added, left, right)


@baddbmm.register_fake
def _(added: Tensor, left: Tensor, right: Tensor, **scales: float) -> Tensor:
    return aten.baddbmm(added, left, right)


@convolution_weight.register_fake
def _(gradient: Tensor, x: Tensor, weight: Tensor, *geometry: Any) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


OPERATORS: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.mm.default: torch.ops.kfac_fx.mm.default,
    aten.bmm.default: torch.ops.kfac_fx.bmm.default,
    aten.addmm.default: torch.ops.kfac_fx.addmm.default,
    aten.baddbmm.default: torch.ops.kfac_fx.baddbmm.default,
}
WEIGHT_GRADIENT = torch.ops.kfac_fx.convolution_weight.default
