"""Finds calls that would wait for a CUDA device, on a CPU, where none does.

In Python (`item`, `tolist`, truth values, numbers copied from the host) and below it (`_local_scalar_dense`,
selections by masks, decompositions that check themselves; eigenvectors always wait, in torch).
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_fx import host

READS = frozenset(
    getattr(Tensor, name)
    for name in ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero")
)
FROM_HOST = frozenset({torch.tensor, torch.as_tensor, torch.scalar_tensor})
DISPATCHED = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        *("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "allclose", "masked_select", "_unique2"),
        *("unique_consecutive", "bincount", "histc", "multinomial", "_linalg_check_errors", "_linalg_eigh"),
        *("_linalg_svd", "linalg_eig", "linalg_lstsq", "linalg_pinv"),
    )
)
COUNTS_REPEATS = torch.ops.aten.repeat_interleave.Tensor
INDEXED = frozenset({torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_})


class Python(TorchFunctionMode):
    """Counts calls that wait for a CUDA device: reads, and numbers that become tensors there."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        copied = func in FROM_HOST and kwargs.get("device") is not None
        copied |= func in (torch.where, Tensor.where) and any(isinstance(a, (int, float)) for a in args)
        if func in READS or copied:
            self.found[func.__name__] += 1
        return func(*args, **kwargs)


class Below(TorchDispatchMode):
    """Counts operators that bring a value to the host, or whose result's size is a value."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func.overloadpacket in INDEXED and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if masks or func is COUNTS_REPEATS or func.overloadpacket in DISPATCHED:
            self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    found: Counter[str] = Counter()
    with Python(found), Below(found):
        yield found


@contextmanager
def running_behind() -> Iterator[None]:
    """Every device runs behind Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "waits", lambda device: True)
        yield
