"""What the state of one layer should be after several batches, and the direction from it: dense algebra.

Enters: explicit statistics of each batch. Leaves: moving averages, scales or roots, and directions, in
float64; or why they have no independent formula. methods.md 1.5, 5 and 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from kfac_fx.contracts import Method
from kfac_fx.methods import EKFAC, FOOF, KFAC, NKFAC, SINGD, SKFAC, Diagonal
from kfac_fx.types import LayerMatch, State
from kfac_fx.verification.records import Check
from kfac_fx.verification.solves import (
    expected_direction,
    joined_orientations,
    nkfac_direction,
    nkfac_share,
    singd_direction,
    singd_update,
)
from kfac_fx.verification.tolerance import Tolerance, compared

AVERAGING = (KFAC, EKFAC, FOOF, Diagonal)


@final
class Held:
    """Follows one layer through the steps. reason: why it cannot; nothing if it can."""

    def __init__(self, method: Method, match: LayerMatch) -> None:
        self._method, self._match = method, match
        self._batches: list[dict[str, Tensor]] = []
        self._scales: Tensor | None = None  # of EKFAC, since its last refresh
        self._refreshed: dict[str, Tensor] = {}
        self._roots: list[Tensor] = []
        self._momenta: list[Tensor] = []
        self.newton = False
        self.reason = _refusal(method, match)

    def fold(self, statistics: Mapping[str, Tensor | str], state: State, *, scale: float) -> None:
        """Take the statistics of a batch. state: of this library, before it. scale: 1/R_ of the batch."""
        known = {name.replace("_rows", ""): t for name, t in statistics.items() if not isinstance(t, str)}
        if len(known) < len(statistics):
            self.reason = self.reason or next(t for t in statistics.values() if isinstance(t, str))
        if self.reason:
            return
        method = self._method
        self._batches.append({name: t.double() for name, t in known.items()})
        if isinstance(method, NKFAC):  # its G is the plain sum over gradients as they are
            self._batches[-1]["G"] = self._batches[-1]["G"] / scale
        if isinstance(method, SINGD):
            self._move_roots(method)
        elif isinstance(method, EKFAC) and "S" in known and self._refreshed:
            old = self._restarted(state) if self._scales is None else self._scales
            self._scales = method.scale_decay * old + (1 - method.scale_decay) * known["S"].double()

    def refresh(self, *, newton: bool) -> None:
        """New inverses of the averages. newton: by steps from the last ones."""
        if not self.reason:
            self._refreshed, self._scales, self.newton = self.averages(), None, newton

    def averages(self) -> dict[str, Tensor]:
        """Of all statistics so far, by the rule of the method."""
        method, batches = self._method, self._batches
        names = [name for name in batches[0] if not (name == "S" and isinstance(method, EKFAC))]
        if isinstance(method, SKFAC):  # a window of one batch
            return {name: batches[-1][name] for name in names}
        retained = [method.decay ** (len(batches) - 1 - i) for i in range(len(batches))]  # type: ignore
        if isinstance(method, NKFAC):
            batches = [{name: nkfac_share(method, batch[name]) for name in names} for batch in batches]
        total = 1.0 if isinstance(method, NKFAC) else sum(retained)
        return {
            name: torch.stack([w * b[name] for w, b in zip(retained, batches, strict=True)]).sum(0) / total
            for name in names
        }

    def checks(self, state: State, where: str, tolerance: Tolerance) -> list[Check]:
        """The state that this library holds against the one followed here."""
        if isinstance(self._method, SINGD):
            expected = dict(zip(("A_root", "G_root"), self._roots, strict=True))
        else:
            expected = self.averages()
            if self._scales is not None:
                expected["S"] = self._scales
        found = []
        for name, tensor in expected.items():
            own = state[name] if name in state else _gram(state[f"{name}_rows"])
            found.append(compared(f"{name} at {where}", own, tensor, tolerance=tolerance.product))
        return found

    def direction(self, gradient: Tensor, state: State) -> Tensor | str:
        """Of this canonical gradient. state: of this library, whose inverses or bases are checked apart."""
        method, gradient = self._method, gradient.double()
        if self.reason:
            return self.reason
        if isinstance(method, SINGD):
            return singd_direction(self._roots, gradient)
        if isinstance(method, Diagonal):
            return expected_direction(method, self._match, self.averages(), gradient)
        if isinstance(method, NKFAC):
            if not self.newton:
                return nkfac_direction(method, self._refreshed, gradient)
            a, g = state["A_inverse"].double(), state["G_inverse"].double()
            return g @ gradient * a if a.dim() == 1 else g @ gradient @ a
        if self._scales is not None and isinstance(method, EKFAC):
            return _in_basis(state, gradient, self._scales + method.damping)
        return expected_direction(method, self._match, self._refreshed, gradient)

    def _move_roots(self, method: SINGD) -> None:
        sides = [self._batches[-1][name] for name in ("A", "G")]
        if not self._roots:
            self._roots = [
                torch.ones_like(m) if m.dim() == 1 else torch.ones_like(m[..., 0]).diag_embed() for m in sides
            ]
            self._momenta = [torch.zeros_like(m) for m in sides]
        self._roots, self._momenta = singd_update(method, self._roots, self._momenta, sides)

    def _restarted(self, state: State) -> Tensor:
        """K-FAC's eigenvalues in the basis that is held: what S starts from at a refresh."""
        factors, values = self._refreshed, []
        if "A_swapped" in factors:
            factors = joined_orientations(factors)
        for side, factor in (("G", factors["G"]), ("A", factors["A"])):
            if f"{side}_basis" not in state:
                values.append(factor.expand(1, -1))
                continue
            basis = state[f"{side}_basis"].double()
            values.append((basis * (factor @ basis)).sum(1).clamp(min=0))
        return values[0].unsqueeze(2) * values[1].unsqueeze(1)


def _refusal(method: Method, match: LayerMatch) -> str:
    if isinstance(method, (NKFAC, SINGD)) and match.tied:
        return f"{method.name} of a weight that is used in both orientations has no independent formula"
    if isinstance(method, SKFAC) and method.window > 1:
        return "a window of several batches has no independent formula"
    if not isinstance(method, (*AVERAGING, NKFAC, SINGD, SKFAC)):
        return f"no independent formula for the state of {method.name}"
    return ""


def _gram(rows: Tensor) -> Tensor:
    return rows.double().mT @ rows.double()


def _in_basis(state: State, gradient: Tensor, scales: Tensor) -> Tensor:
    """Q_G [(Q_G^T grad Q_A) / scales] Q_A^T."""
    q_g = state["G_basis"].double()
    q_a = state["A_basis"].double() if "A_basis" in state else None
    turned = q_g.mT @ gradient if q_a is None else q_g.mT @ gradient @ q_a
    back = q_g @ torch.where(scales > 0, turned / scales, 0.0)
    return back if q_a is None else back @ q_a.mT
