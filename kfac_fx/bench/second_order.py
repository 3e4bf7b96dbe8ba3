"""A compiled step as a contender. The one place that reads the inside of a `TrainStep`.

What is due at a step is decided by its count of steps, so that setting the count chooses the kind of step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, final

from torch import Tensor, nn

import kfac_fx
from kfac_fx.bench.contender import LEARNING_RATE, Data, kinds_of, model_tensors
from kfac_fx.contents import Contents
from kfac_fx.contracts import Method
from kfac_fx.curvature import Curvature
from kfac_fx.errors import KfacFxError
from kfac_fx.graph import tree_leaves
from kfac_fx.instrument import Variant
from kfac_fx.lower import execution

PROGRAMS: tuple[Variant, ...] = ("gradients", "plain", "statistics")


@final
class SecondOrder:
    """`kfac_fx.compile` of a model with the method's published optimizer at a tiny learning rate."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        *,
        method: Method,
        backend: str,
        options: Mapping[str, Any],
    ) -> None:
        loss_fn, *self._batch = data
        self._method = method
        step = kfac_fx.compile(model, loss_fn, method=method, backend=backend, **options)
        self._step, self._progress = step, step._progress
        self._staggered = options.get("refresh", "together") == "staggered"
        self._modelled = self._progress.quadratic is not None
        if not self._modelled:  # the quadratic model takes the length of the update from lr 1
            for group in step.optimizer.param_groups:
                group["lr"] = LEARNING_RATE
        self.every = method.statistics_every, method.inverse_every
        step(*self._batch)  # statistics are due until there are some
        period = range(math.lcm(method.statistics_every, max(1, method.inverse_every)))
        self.kinds = kinds_of(lambda index: (bool(self._layers(index)), self._refreshes(index)), len(period))
        firsts = {(self._layers(index), self._refreshes(index)): index for index in reversed(period)}
        for index in sorted(firsts.values()):
            self.run(index)

    def _layers(self, index: int) -> frozenset[str]:
        """Whose statistics are due; staggered, each choice of them is a program of its own."""
        self._progress.steps = index
        return self._progress.collecting(self._step.plan)

    def _refreshes(self, index: int) -> bool:
        self._progress.steps = index
        slot = self._staggered and bool(self._progress.curvature.slot(index))
        return self._progress.refresh_due or slot

    def run(self, index: int) -> None:
        """One training step, as number `index` of the schedule."""
        self._progress.steps = index
        self._step(*self._batch)

    def parts(self) -> Mapping[str, Callable[[], Any]]:
        """Programs of the step, and what it runs beside them.

        None for a method that takes its update from the quadratic model.
        """
        if self._modelled:
            return {}
        step, curvature = self._step, self._progress.curvature
        contents = Contents.of(step.model)
        compiled, batch = step._captures.fitting(contents, *self._batch)
        rates = functools.partial(step._link.learning_rates, contents)

        def run(variant: Variant) -> Mapping[str, Tensor]:
            tensors = [*contents.tensors, *batch.tensors]
            return compiled.call(variant, tensors, rates=rates, watch=step._watch).gradients

        gradients = run("gradients")
        parts: dict[str, Callable[[], Any]] = {name: functools.partial(run, name) for name in PROGRAMS}
        parts["update"] = lambda: step._link.apply(contents, gradients)
        if self._method.inverse_every > 0:
            parts["refresh"] = lambda: self._refresh(curvature)
        return parts

    def _refresh(self, curvature: Curvature) -> None:
        with execution():
            curvature.refresh(self._method)

    def tensors(self) -> Iterable[Tensor]:
        """The model's, the optimizer's state and the curvature."""
        self._snapshot = self._progress.curvature.snapshot()  # keeps what is no plain tensor, for `_memory`
        held = [leaf for leaf in tree_leaves(self._snapshot) if isinstance(leaf, Tensor)]
        return [*model_tensors(self._step.model, self._step.optimizer), *held]


def scheduled(method: Method, *, statistics_every: int | None, inverse_every: int | None) -> Method:
    """The method with another schedule. A method that inverts nothing keeps `inverse_every` 0.

    Raises `KfacFxError` where the method refuses it.
    """
    changes: dict[str, int] = {}
    if statistics_every is not None:
        changes["statistics_every"] = statistics_every
    if inverse_every is not None and method.inverse_every > 0:
        changes["inverse_every"] = inverse_every
    if not changes:
        return method
    if not dataclasses.is_dataclass(method):
        raise KfacFxError(f"method {method.name!r} is no dataclass: make one with the schedule you want.")
    try:
        return dataclasses.replace(method, **changes)
    except ValueError as error:
        raise KfacFxError(str(error)) from error
