"""The captures of one model: a `Compiled` for each batch shape, mode and pattern of frozen parameters.

Enters: what the user passes to a step. Leaves: the capture that fits, made at the first batch of its kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch import nn

from kfac_fx import guards
from kfac_fx.batch import Batch, flatten_batch
from kfac_fx.compiled import Compiled
from kfac_fx.contents import Contents
from kfac_fx.curvature import Curvature
from kfac_fx.errors import KfacFxError
from kfac_fx.forward import forward_program
from kfac_fx.planned import Plan

Tracer = Callable[[Batch], Plan]


@final
class Captures:
    """Captures so far; all of them share one curvature state.

    tracer: the plan for a batch. modelled: whether the method needs the forward alone (the quadratic model).
    """

    def __init__(
        self, model: nn.Module, curvature: Curvature, *, tracer: Tracer, backend: str, modelled: bool
    ) -> None:
        self._model = model
        self._curvature = curvature
        self._tracer = tracer
        self._backend = backend
        self._modelled = modelled
        self._fingerprint = guards.fingerprint(Contents.of(model))
        self._compiled: dict[object, Compiled] = {}
        self._last: Compiled | None = None

    @property
    def plans(self) -> list[Plan]:
        """Plans of all captures."""
        return [compiled.plan for compiled in self._compiled.values()]

    @property
    def num_compiled(self) -> int:
        """How many programs have run, of all captures."""
        return sum(len(compiled.callables) for compiled in self._compiled.values())

    def forget(self) -> None:
        """Capture anew at the next batch."""
        self._compiled.clear()
        self._last = None

    @property
    def first(self) -> Compiled:
        """The capture of the first batch. Raises `KfacFxError` before there is one."""
        if not self._compiled:
            raise KfacFxError(
                "nothing is captured yet: tracing happens at the first call step(inputs, targets)."
            )
        return next(iter(self._compiled.values()))

    @property
    def changing_buffers(self) -> frozenset[str]:
        """Buffers that the capture used last changes in place."""
        return frozenset() if self._last is None else self._last.changing_buffers

    def check(self, contents: Contents) -> None:
        """Raise `ModelChangedError` if the model's parameters are not those that were compiled."""
        guards.check_unchanged(contents, self._fingerprint)

    def fitting(self, contents: Contents, inputs: Any, targets: Any) -> tuple[Compiled, Batch]:
        """The capture for this batch, and the batch as flat tensors. contents: of the model, now.

        Raises `ModelChangedError`, `InputError`, `CaptureError`.
        """
        self.check(contents)
        batch = flatten_batch(inputs, targets)
        guards.check_batch(batch, self._model)
        key = guards.capture_key(contents, batch)
        compiled = self._compiled.get(key) or self._captured(batch)
        if compiled is not self._last:
            self._curvature.adopt(compiled.plan)
        self._compiled[key] = self._last = compiled
        return compiled, batch

    def _captured(self, batch: Batch) -> Compiled:
        plan = self._tracer(batch)
        forward = forward_program(plan.capture) if self._modelled else None
        return Compiled(plan=plan, backend=self._backend, curvature=self._curvature, forward=forward)
