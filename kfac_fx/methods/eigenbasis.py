"""Eigenvectors of both factors of a layer, and solving with them.

Enters: factors, gradients. Leaves: state tensors `A_basis`, `A_eigenvalues`, `G_basis`, `G_eigenvalues`; a
diagonal factor is its own eigenvalues and has no basis. methods.md 1.6 D0, 1.7 and 6.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfac_fx.spectrum import eigendecompositions
from kfac_fx.types import Refreshed, State


def decomposed(
    sides: Mapping[str, Sequence[Tensor]], states: Mapping[str, State]
) -> tuple[dict[str, State], Refreshed]:
    """Bases and eigenvalues of (A, G) of every layer; equal sizes in one batched call.

    states: the last bases, kept for a factor that cannot be decomposed. A tensor that several layers share
    is decomposed once.
    """
    new: dict[str, State] = {key: {} for key in sides}
    places: dict[int, list[tuple[str, str]]] = {}
    factors: dict[int, Tensor] = {}
    for key, pair in sides.items():
        for side, factor in zip(("A", "G"), pair, strict=True):
            if factor.dim() == 1:
                new[key][f"{side}_eigenvalues"] = factor.clamp(min=0)
                continue
            factors[id(factor)] = factor
            places.setdefault(id(factor), []).append((key, side))
    first = [places[number][0] for number in factors]
    last = [states[key][f"{side}_basis"] for key, side in first]
    result = eigendecompositions(list(factors.values()), last=last)
    for number, basis, values in zip(factors, result.bases, result.values, strict=True):
        dtype = factors[number].dtype
        basis, values = basis.to(dtype), values.to(dtype)
        for key, side in places[number]:
            old = states[key].get(f"{side}_eigenvalues")
            if old is not None:
                values = torch.where(torch.isfinite(values).all(-1, keepdim=True), values, old)
            new[key] |= {f"{side}_basis": basis, f"{side}_eigenvalues": values}
    return new, Refreshed(retried=0, kept_last=result.kept_last)


def outer(g_values: Tensor, a_values: Tensor) -> Tensor:
    """Eigenvalues of G (x) A, [groups, d_out, d_in], from [groups, d_out] and [groups, d_in] or [d_in]."""
    return g_values.unsqueeze(-1) * a_values.unsqueeze(-2)


def solved_in_basis(state: State, gradient: Tensor, damped: Tensor) -> Tensor:
    """Q_G [(Q_G^T grad Q_A) / damped] Q_A^T; 0 where damped is: no step without curvature and damping.

    gradient, damped: [groups, d_out, d_in].
    """
    q_g, q_a = state["G_basis"], state.get("A_basis")
    rotated = q_g.mT @ gradient.to(q_g.dtype)
    rotated = rotated if q_a is None else rotated @ q_a
    solved = q_g @ (rotated / damped).masked_fill(~(damped > 0), 0.0)
    return solved if q_a is None else solved @ q_a.mT
