"""What a training step keeps between calls, and what is due at the next one.

Enters: a method, batches that wait. Leaves: the state to save; on failure everything as it was. Parameters
and the optimizer's state are the user's objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from kfac_fx import host
from kfac_fx.adaptive import Point, quadratic_update
from kfac_fx.contracts import DampedMethod, Method
from kfac_fx.curvature import Curvature, Rates, Snapshot
from kfac_fx.errors import KfacFxError
from kfac_fx.lower import execution
from kfac_fx.pending import Pending
from kfac_fx.planned import Plan
from kfac_fx.schedule import check_staggered
from kfac_fx.stages import runs

Phase = Callable[[str], AbstractContextManager[None]]


@final
class Progress:
    """How far the training of one model is.

    steps: updates so far. curvature: factors and inverses. quadratic: state of the quadratic model, None for
    methods without. pending: batches that wait for an update. staggered: whether each step of a period
    renews some of the inverses, in place of all at its first step.
    """

    def __init__(self, method: Method, model: nn.Module, *, staggered: bool = False) -> None:
        if staggered:
            check_staggered(method)
        self._method = method
        self._model = model
        self._staggered = staggered
        self._before: Snapshot | None = None  # this step's staggered refresh, while batches wait
        self.steps = 0
        self.curvature = Curvature(method)
        self.quadratic = quadratic_update(method)
        self.pending: Pending | None = None

    def collecting(self, plan: Plan) -> frozenset[str]:
        """Layers of this plan whose statistics the next batch gives."""
        if not runs("statistics", plan.without):
            return frozenset()
        layers = frozenset(match.key for match in plan.matched)
        if self.curvature.empty:
            return layers
        if self._staggered:
            return layers & self.curvature.part(self.steps)
        return layers if self.steps % self._method.statistics_every == 0 else frozenset()

    @property
    def refresh_due(self) -> bool:
        """Whether the next update starts with new inverses, from its own statistics too.

        Staggered: of the layers that have none yet.
        """
        if self._staggered:
            return bool(self.curvature.late)
        every = self._method.inverse_every
        return every > 0 and (self.steps % every == 0 or self.curvature.empty)

    def refresh(self) -> None:
        """The refresh that is due, with the statistics of this update."""
        if self._staggered:
            self.curvature.refresh(self._method, self.curvature.late)
        else:
            self.curvature.refresh(self._method)

    def directions(
        self, point: Point | None, *, rates: Rates, phase: Phase
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Gradients of the batches that wait, and what goes to the optimizer in their place.

        Their statistics join the state, and inverses are refreshed when due. point: where the quadratic model
        is expanded, for methods with one. phase: around each part, with its name.
        """
        pending, refresh = self.pending, self.refresh_due
        assert pending is not None, "an update has batches that wait"
        plan, gradients = pending.plan, pending.gradients
        if pending.statistics:
            with phase("moving averages"):
                self.curvature.fold(plan, pending.statistics, pending.weight, finite=pending.finite)
        if self.quadratic is not None and point is not None:
            options = {"curvature": self.curvature, "refresh": refresh, "rates": rates, "step": self.steps}
            with phase("refresh, precondition, quadratic model"):
                delta = self.quadratic.update(plan, point, gradients, **options)
            return gradients, {name: -tensor for name, tensor in delta.items()}
        if refresh:
            with phase("refresh"):
                self.refresh()
        if pending.finite is not None:
            gradients = host.zeros_unless(pending.finite, gradients)
        with phase("precondition"):
            return gradients, gradients | self.curvature.preconditioned(plan, gradients, rates=rates)

    @property
    def damping(self) -> float:
        """Lambda of the next step. Raises `KfacFxError` for a method without one of this kind."""
        if self.quadratic is not None:
            return self.quadratic.strength.damping
        if not isinstance(self._method, DampedMethod):
            raise KfacFxError(f"method {self._method.name!r} has no damping of this kind: read step.method.")
        return self._method.damping

    @property
    def gamma(self) -> float | None:
        """Gamma of the factored damping of the next step, where the method adapts it apart from lambda."""
        squared = None if self.quadratic is None else self.quadratic.strength.gamma_squared
        return None if squared is None else math.sqrt(squared)

    def begin(self, phase: Phase) -> None:
        """Before the first program of a step: the staggered refresh of its slot, from earlier statistics.

        phase: around it, with its name.
        """
        if not self._staggered or self.pending is not None:
            return
        self._before = self.curvature.snapshot()
        if slot := self.curvature.slot(self.steps):
            with execution(), phase("refresh"):
                self.curvature.refresh(self._method, slot)

    def finished(self) -> None:
        """An update was made of the batches that waited, or of one."""
        self.steps += 1
        self.pending = self._before = None

    def discard(self) -> None:
        """Forget the batches that wait, and what was refreshed for them."""
        if self.pending is not None and self._before is not None:
            self.curvature.restore(self._before)
        self.pending = self._before = None

    @contextmanager
    def rolled_back_on_error(self, buffers: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """If anything fails inside, all that is kept here and these buffers are what they were.

        buffers: those that the model changes, by name. Gives their old values.
        """
        steps, pending, before = self.steps, self.pending, self._before
        curvature = self.curvature.snapshot()
        quadratic = None if self.quadratic is None else self.quadratic.snapshot()
        old = {name: buffer.clone() for name, buffer in buffers.items()}
        try:
            yield old
        except BaseException:
            self.steps, self.pending, self._before = steps, pending, before
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
        self.steps, self._before = int(state["step"]), None
