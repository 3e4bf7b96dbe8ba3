"""What a training step keeps between calls, and what is due at the next one.

Enters: a method, batches that wait. Leaves: the state to save; on failure everything as it was. Parameters
and the optimizer's state are the user's objects.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from kfac_fx.adaptive import quadratic_update
from kfac_fx.contracts import Method, Plan
from kfac_fx.curvature import Curvature
from kfac_fx.pending import Pending


@final
class Progress:
    """How far the training of one model is.

    steps: updates so far. curvature: factors and inverses. quadratic: state of the quadratic model, None for
    methods without. pending: batches that wait for an update.
    """

    def __init__(self, method: Method, model: nn.Module) -> None:
        self._method = method
        self._model = model
        self.steps = 0
        self.curvature = Curvature(method)
        self.quadratic = quadratic_update(method)
        self.pending: Pending | None = None

    @property
    def statistics_due(self) -> bool:
        """Whether the next batch gives statistics."""
        return self.steps % self._method.statistics_every == 0 or self.curvature.empty

    @property
    def refresh_due(self) -> bool:
        """Whether the next update starts with new inverses."""
        every = self._method.inverse_every
        return every > 0 and (self.steps % every == 0 or self.curvature.empty)

    @contextmanager
    def rolled_back_on_error(self, changing: Collection[str]) -> Iterator[dict[str, Tensor]]:
        """If anything fails inside, all that is kept here and the model's buffers are what they were.

        changing: names of the buffers that the model changes. Gives their old values.
        """
        steps, pending, curvature = self.steps, self.pending, self.curvature.snapshot()
        quadratic = None if self.quadratic is None else self.quadratic.snapshot()
        buffers = {name: b for name, b in self._model.named_buffers() if name in changing}
        old = {name: buffer.clone() for name, buffer in buffers.items()}
        try:
            yield old
        except BaseException:
            self.steps, self.pending = steps, pending
            self.curvature.restore(curvature)
            if self.quadratic is not None and quadratic is not None:
                self.quadratic.restore(quadratic)
            with torch.no_grad():
                for name, buffer in buffers.items():
                    buffer.copy_(old[name])
            raise

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers; batches that wait are not in it."""
        quadratic = {} if self.quadratic is None else {"quadratic": self.quadratic.state_dict()}
        return {"step": self.steps, **self.curvature.state_dict(), **quadratic}

    def load_state_dict(self, state: Mapping[str, Any], plans: Sequence[Plan]) -> None:
        """Continue from `state_dict`. plans: captures that exist and that the state has to fit.

        Raises `StateError` before anything is changed.
        """
        if self.quadratic is not None:
            self.quadratic.check_state(state, self._model)
        self.curvature.load_state_dict(state, plans)
        if self.quadratic is not None:
            self.quadratic.load_state_dict(state["quadratic"])
        self.steps = int(state["step"])
