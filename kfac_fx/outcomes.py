"""What the refreshes of the inverses came to: counts, and which layers need care at their next one.

Enters: what a method returned for some layers. Leaves: a new record. No tensor is read where that would wait.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from kfac_fx.host import Later
from kfac_fx.types import Refreshed

Counted = int | Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Of all refreshes so far.

    retried: factors that were inverted in float64. kept_last: factors that kept their last inverse. last: how
    many of both in the last refresh of each layer's unit, where that is not known to be none.
    """

    retried: Counted = 0
    kept_last: Counted = 0
    last: Mapping[str, Later] = field(default_factory=dict)

    def after(self, keys: Collection[str], refreshed: Refreshed) -> Outcomes:
        """With a refresh of these layers."""
        total = refreshed.retried + refreshed.kept_last
        last = {key: later for key, later in self.last.items() if key not in keys}
        if isinstance(total, Tensor):
            last |= dict.fromkeys(keys, Later(total.reshape(1)))
        elif total:
            last |= dict.fromkeys(keys, _trouble())
        return Outcomes(
            retried=self.retried + refreshed.retried,  # not in place: a snapshot may hold the tensor
            kept_last=self.kept_last + refreshed.kept_last,
            last=last,
        )

    def troubled(self, keys: Collection[str]) -> bool:
        """Whether a factor of these layers failed at the last refresh; waits for that, not for later work."""
        found = {id(self.last[key]): self.last[key] for key in keys if key in self.last}
        return any(later.read() != [0.0] for later in found.values())

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and names."""
        troubled = [key for key in self.last if self.troubled([key])]
        return {"retried": int(self.retried), "kept_last": int(self.kept_last), "troubled": troubled}

    @staticmethod
    def loaded(saved: Mapping[str, Any]) -> Outcomes:
        """From `state_dict`; of states without names of layers, all count as troubled."""
        troubled = saved.get("troubled", saved.get("refreshes", {}))
        return Outcomes(
            retried=int(saved["retried"]),
            kept_last=int(saved["kept_last"]),
            last=dict.fromkeys(troubled, _trouble()),
        )


def _trouble() -> Later:
    return Later(torch.ones(1))
