"""FOOF: the input's second moment alone, no curvature of the loss. A cheap baseline.

Benzing 2022, "Gradient Descent on Neurons and its Link to Approximate Second-Order Optimization"
(arXiv:2201.12250). methods.md 1.2 (forward-only) and oracle E13: G is the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kfac_fx.methods.base import KroneckerFactored, identity, zeros
from kfac_fx.methods.costs import factor_shapes
from kfac_fx.methods.damping import inverted
from kfac_fx.types import LayerMatch, Refreshed, State


@dataclass(frozen=True, kw_only=True)
class FOOF(KroneckerFactored):
    """Gradient descent on neurons: K-FAC with the input's factor alone, V = grad (A + lambda I)^-1.

    damping: lambda, in units of squared inputs. 0: none, but the pseudo-inverse of A. decay: weight of the
    old average per statistics update. statistics_every, inverse_every: steps. max_factor_dim: larger layers
    are left to the optimizer. Scales and shifts and weights that are also used transposed are left to it too.
    """

    damping: float = 0.03

    name: ClassVar[str] = "foof"
    paper: ClassVar[str] = "Benzing 2022 (arXiv:2201.12250)"
    stored: ClassVar[str] = "A and its inverse: 2 d_A^2"
    costs: ClassVar[tuple[str, str, str]] = ("2 n d_A^2", "d_A^3", "2 d_A^2 d_G")
    shared_names: ClassVar[frozenset[str]] = frozenset({"A", "A_inverse"})

    def refuses(self, match: LayerMatch) -> str | None:
        """What is no product with an input: scales and shifts, and weights that are also used transposed."""
        if match.structure == "block":
            return "foof knows inputs alone; scales, shifts and added parameters have no product with them"
        if match.tied:
            return "foof knows one input; a weight that is also used transposed has two"
        return None

    def init(self, match: LayerMatch, *, dtype: torch.dtype, device: torch.device) -> State:
        """Zero A and an identity inverse."""
        sizes = factor_shapes(match)["A"]
        state = zeros({"A": sizes}, dtype=dtype, device=device)
        return state | {"A_inverse": identity(sizes, dtype=dtype, device=device)}

    def statistics_names(self, match: LayerMatch) -> tuple[str, ...]:
        """A."""
        return ("A",)

    def refresh(
        self, states: Mapping[str, State], *, counts: Mapping[str, int]
    ) -> tuple[dict[str, State], Refreshed]:
        """(A + lambda I)^-1 of every A once, equal sizes in one batched call."""
        owners = {id(state["A"]): key for key, state in states.items()}
        sides = {key: (states[key]["A"],) for key in owners.values()}
        dampings = {key: (_spread(self.damping, a),) for key, (a,) in sides.items()}
        return inverted(sides, dampings, states, undamped=self.damping == 0)

    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        """V = grad A^-1."""
        inverse = state["A_inverse"]
        gradient = gradient.to(inverse.dtype)
        return gradient * inverse if inverse.dim() == 1 else gradient @ inverse

    def kept_sides(self, match: LayerMatch) -> tuple[str, ...]:
        """A."""
        return ("A",)


def _spread(damping: float, factor: Tensor) -> Tensor:
    """The number once per group."""
    return factor.new_full((1 if factor.dim() == 1 else factor.shape[0],), damping)
