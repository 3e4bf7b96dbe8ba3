"""Values between host and device without waiting, and who may wait.

A CUDA device works behind Python until Python reads a value of it. No step but a layer's first does that (and
a refresh by eigenvectors or after one that failed, a step that makes thin factors grow, and the quadratic
model): what the host has to know is copied in the background and looked at later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import final

import torch
from torch import Tensor

_reading: ContextVar[bool] = ContextVar("reading", default=False)


def waits(device: torch.device) -> bool:
    """Whether reading a value of this device waits until all its work is done."""
    return device.type == "cuda"


def may_read(device: torch.device) -> bool:
    """Whether values of this device may be read here."""
    return not waits(device) or _reading.get()


@contextmanager
def reading(allowed: bool) -> Iterator[None]:
    """Inside values may be read, if this or an outer one allows it."""
    token = _reading.set(allowed or _reading.get())
    try:
        yield
    finally:
        _reading.reset(token)


def to_device(values: Sequence[float], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor [n]; from pinned memory, since a copy from other memory waits."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def zeros_unless(finite: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, or zeros. finite: 0-dim bool."""
    return {name: tensor.masked_fill(~finite, 0.0) for name, tensor in tensors.items()}


def kept_unless(finite: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """The new tensor, or the old one. finite: 0-dim bool, read here if their sizes differ."""
    if new.shape != old.shape:
        return new if bool(finite) else old
    return torch.where(finite, new, old)


@final
class Later:
    """Values of a tensor for the host, copied as soon as the device has them. values: [n]."""

    def __init__(self, values: Tensor) -> None:
        self._copy = values.detach().double().to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if values.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(values.device))

    @property
    def ready(self) -> bool:
        """Whether `read` need not wait."""
        return self._copied is None or self._copied.query()

    def read(self) -> list[float]:
        """The values; waits for them."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy.numpy().tolist()
