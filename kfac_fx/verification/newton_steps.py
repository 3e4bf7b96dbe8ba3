"""A warm-started refresh of NKFAC: the error of each stored inverse, as it follows from the error before.

Enters: averages, the inverses before and after. Leaves: checks. With E = I - M B a step from B leaves
(1 - al) E + al E^2 (methods.md 5.4), al = 1, or 1 / ||M B||_F where ||E||_F >= 1 (5.3).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kfac_fx.methods import NKFAC
from kfac_fx.types import State
from kfac_fx.verification.records import Check
from kfac_fx.verification.solves import nkfac_damping
from kfac_fx.verification.tolerance import distance


def newton_checks(
    method: NKFAC,
    averages: Mapping[str, Tensor],
    before: State,
    after: State,
    *,
    where: str,
    tolerance: float,
) -> list[Check]:
    """One per factor; where a refresh kept an inverse that it could not improve, the reason."""
    return [
        _check(method, averages[side], side, before, after, where=where, tolerance=tolerance)
        for side in ("A", "G")
    ]


def _check(
    method: NKFAC, factor: Tensor, side: str, before: State, after: State, *, where: str, tolerance: float
) -> Check:
    name = f"inverse of {side} at {where}"
    old, new = before[f"{side}_inverse"].double(), after[f"{side}_inverse"].double()
    if factor.dim() == 1:
        wanted = 1 / (factor + nkfac_damping(method, factor))
        return Check(name=name, error=distance(new, wanted), tolerance=tolerance)
    if bool(before[f"{side}_kept"].any()):
        return Check(name=name, reason="the refresh before kept an inverse")
    error = 0.0
    for m, b, x in zip(factor, old, new, strict=True):
        eye = torch.eye(len(m), dtype=m.dtype, device=m.device)
        damped = m + nkfac_damping(method, m) * eye
        expected = _error_after(method, eye - damped @ b, eye)
        if isinstance(expected, str):
            return Check(name=name, reason=expected)
        size = max(1.0, float(expected.abs().max()))
        error = max(error, distance(eye - damped @ x, expected, size=size))
    return Check(name=name, error=error, tolerance=tolerance, detail="residual after its Newton steps")


def _error_after(method: NKFAC, error: Tensor, eye: Tensor) -> Tensor | str:
    for _ in range(method.newton_steps):
        rate = 1.0
        if float(error.norm()) >= 1:
            if method.guard != "frobenius":
                return "the norm of this guard is an estimate"
            rate = 1 / float((eye - error).norm())
        error = (1 - rate) * error + rate * error @ error
    return error
