"""How strong the damping is: lambda of the quadratic model, gamma of the factors, and how both are adapted.

Martens & Grosse 2015, sections 6.5 and 6.6 (arXiv:1503.05671); methods.md 2.5, 2.7. Plain numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from kfac_fx.errors import StateError
from kfac_fx.types import QuadraticSettings


@final
@dataclass(frozen=True, kw_only=True)
class Strength:
    """Lambda and gamma of the next step.

    damping: lambda. gamma_squared: what the preconditioner is damped with, in units of lambda; None for
    lambda + eta throughout. ratio: the last reduction ratio rho, None before the first adaptation.
    """

    settings: QuadraticSettings
    damping: float
    gamma_squared: float | None
    ratio: float | None = None

    @staticmethod
    def initial(damping: float, settings: QuadraticSettings) -> Strength:
        """Lambda, and gamma = sqrt(lambda + eta)."""
        gamma_squared = damping + settings.l2 if settings.gamma_every else None
        return Strength(settings=settings, damping=float(damping), gamma_squared=gamma_squared)

    @property
    def of_model(self) -> float:
        """Lambda + eta."""
        return self.damping + self.settings.l2

    def candidates(self, step: int) -> tuple[float, ...]:
        """Gamma^2 to try after `step` updates. The present one, which stays if none is better, is first."""
        if self.gamma_squared is None:
            return (self.of_model,)
        if step == 0 or step % self.settings.gamma_every:
            return (self.gamma_squared,)
        factor = self.settings.gamma_factor
        others = self._bounded(self.gamma_squared * factor), self._bounded(self.gamma_squared / factor)
        return tuple(dict.fromkeys((self.gamma_squared, *others)))

    def chosen(self, gamma_squared: float) -> Strength:
        """With this candidate."""
        return self if self.gamma_squared is None else replace(self, gamma_squared=gamma_squared)

    def adapts_after(self, step: int) -> bool:
        """Whether lambda is adapted after the update that follows `step` others."""
        return self.settings.adapt_every > 0 and (step + 1) % self.settings.adapt_every == 0

    def adapted(self, change: float, predicted: float) -> Strength:
        """Levenberg-Marquardt: less damping where the model predicts well, more where it does not.

        change: of the objective by the update. predicted: M(delta) - M(0), at most 0.
        """
        if predicted >= 0:
            return self
        ratio, damping = change / predicted, self.damping
        if ratio > 0.75:
            damping *= self.settings.adapt_factor
        elif not ratio >= 0.25:  # also where the new loss is not a number
            damping /= self.settings.adapt_factor
        return replace(self, damping=self._bounded(damping), ratio=ratio)

    def _bounded(self, damping: float) -> float:
        least, largest = self.settings.damping_bounds
        return min(max(damping, least), largest)

    def state_dict(self) -> dict[str, float]:
        """Lambda, and gamma^2 where it is adapted."""
        gamma = {} if self.gamma_squared is None else {"gamma_squared": self.gamma_squared}
        return {"damping": self.damping, **gamma}

    def loaded(self, saved: Mapping[str, Any]) -> Strength:
        """Those of `state_dict`. Raises `StateError` if gamma was not adapted there."""
        if self.gamma_squared is None:
            return replace(self, damping=float(saved["damping"]), ratio=None)
        if "gamma_squared" not in saved:
            raise StateError(
                "the saved state has no gamma: it was saved by a method with adaptive_gamma=False. "
                "Load it into such a method."
            )
        gamma_squared = float(saved["gamma_squared"])
        return replace(self, damping=float(saved["damping"]), gamma_squared=gamma_squared, ratio=None)
