"""How far two computations of the same may be apart in a precision, and how the distance is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kfac_fx.verification.records import Check


@final
@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Largest relative errors that are rounding.

    product: sums of products in another order. solve: of a damped system, whose condition number counts.
    """

    product: float
    solve: float


TOLERANCES = {
    torch.float64: Tolerance(product=1e-10, solve=1e-6),
    torch.float32: Tolerance(product=1e-4, solve=2e-2),
    torch.bfloat16: Tolerance(product=5e-2, solve=2e-1),
    torch.float16: Tolerance(product=1e-2, solve=1e-1),
}


def tolerance_of(dtype: torch.dtype) -> Tolerance:
    """Of a parameter dtype."""
    return TOLERANCES[dtype]


def wide(tensor: Tensor) -> Tensor:
    """In float64, to be measured. Flags are 0 and 1; complex numbers get a last dimension of two parts."""
    tensor = tensor.detach()
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).double()


def distance(found: Tensor, expected: Tensor, *, size: float | Tensor | None = None) -> float:
    """Largest difference relative to `size`, of `expected` where that is None. Infinite if shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    if found.is_complex() != expected.is_complex():
        return math.inf
    reference = wide(expected)
    largest = float((wide(found) - reference).abs().max())
    size = float(reference.abs().max() if size is None else size)
    if largest == 0.0:
        return 0.0
    return largest / size if size > 0 else largest


def compared(name: str, found: Tensor, expected: Tensor, *, tolerance: float, detail: str = "") -> Check:
    """The check that both are equal up to rounding."""
    return Check(name=name, error=distance(found, expected), tolerance=tolerance, detail=detail)


def joined(name: str, checks: list[Check]) -> Check:
    """Several checks as one: what is violated first, then what is not checked, else the largest error."""
    violated = [check for check in checks if check.status == "violated"]
    missing = [check for check in checks if check.error is None]
    if violated:
        chosen = max(violated, key=_excess)
    elif missing:
        chosen = missing[0]
    else:
        chosen = max(checks, key=_excess)
    detail = ": ".join(filter(None, (chosen.name, chosen.detail))) if len(checks) > 1 else chosen.detail
    return Check(
        name=name, error=chosen.error, tolerance=chosen.tolerance, reason=chosen.reason, detail=detail
    )


def _excess(check: Check) -> float:
    assert check.error is not None
    return math.inf if math.isnan(check.error) else check.error / (check.tolerance or 1.0)
