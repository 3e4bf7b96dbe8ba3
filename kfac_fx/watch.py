"""Whether the loss and gradients of each step are finite: at once, or in time on a device that runs behind.

Enters: loss and check of a program. Leaves: an error, and until it is known a 0-dim bool on the device.
"""

from __future__ import annotations

import math
from collections import deque
from typing import final

import torch
from torch import Tensor

from kfac_fx.errors import NonFiniteLossError
from kfac_fx.host import Later

_REMEDY = "Skip this batch, or lower the learning rate or raise the damping."


@final
class Watch:
    """The checks of the steps of one model. deferred: whether a step does not wait for its own."""

    def __init__(self, *, deferred: bool) -> None:
        self._deferred = deferred
        self._calls = 0
        self._waiting: deque[tuple[int, Later]] = deque()

    def check(self, loss: Tensor, gradients: Tensor, *, at_once: bool) -> Tensor | None:
        """None if both are finite; where that is not known yet, a 0-dim bool.

        gradients: a number that is finite if they are. at_once: wait in any case. Raises
        `NonFiniteLossError`.
        """
        self._calls += 1
        values = torch.stack([loss.detach().to(gradients.dtype), gradients])
        if self._deferred and not at_once:
            self._waiting.append((self._calls, Later(values)))
            return torch.isfinite(values).all()
        if not bool(torch.isfinite(values).all()):
            unchanged = "parameters, buffers, optimizer state and curvature are unchanged"
            raise NonFiniteLossError(f"{_what(*values.tolist())}: {unchanged}. {_REMEDY}")
        return None

    def settle(self, *, wait: bool = False) -> None:
        """Raise `NonFiniteLossError` if an earlier step was not finite, once for each that is known by now.

        wait: until all are known.
        """
        while self._waiting and (wait or self._waiting[0][1].ready):
            call, values = self._waiting.popleft()
            loss, gradients = values.read()
            if not (math.isfinite(loss) and math.isfinite(gradients)):
                ago = self._calls - call + 1
                raise NonFiniteLossError(
                    f"{ago} {'call' if ago == 1 else 'calls'} ago {_what(loss, gradients)}. Its gradients "
                    "counted as zero: buffers and curvature kept their values, and the optimizer moved the "
                    "parameters by momentum and weight decay alone. Nothing was done with the present call: "
                    "repeat it to go on. If this comes often, lower the learning rate or raise the damping."
                )

    def forget(self) -> None:
        """Leave out what is not known yet."""
        self._waiting.clear()


def _what(loss: float, gradients: float) -> str:
    if math.isfinite(loss) and not math.isfinite(gradients):
        return f"the loss is {loss}, but its gradient is not finite"
    return f"the loss is {loss}"
