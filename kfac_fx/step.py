"""`TrainStep`: which program runs now, the state between steps, `state_dict`.

One step: the program of this batch's shapes gives loss and gradients (and statistics when due); inverses are
refreshed when due; the gradients are preconditioned; the optimizer, PyTorch's own, updates the parameters.
Nothing changes unless all succeeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from kfac_fx import guards
from kfac_fx.adaptive import Point, check_plain_sgd, quadratic_update
from kfac_fx.batch import Batch
from kfac_fx.canonical import gradient_names, initial_state, state_owner
from kfac_fx.captures import Captures
from kfac_fx.compiled import Compiled, Graphs
from kfac_fx.contracts import DampedMethod, Method, Plan
from kfac_fx.curvature import Curvature
from kfac_fx.errors import KfacFxError
from kfac_fx.functions import precondition_function
from kfac_fx.instrument import Variant
from kfac_fx.lower import execution, resolve_backend
from kfac_fx.optimizer import OptimizerLink
from kfac_fx.pending import Pending
from kfac_fx.trace import trace
from kfac_fx.types import Fisher, LossFn, Sharing


@final
class TrainStep:
    """A compiled training step. Made by `kfac_fx.compile`; see there."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn | None,
        *,
        method: Method,
        optimizer: torch.optim.Optimizer | None,
        fisher: Fisher,
        sharing: Sharing,
        exclude: tuple[str, ...],
        backend: str,
        strict: bool,
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.method = method
        guards.check_trainable(model)
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = method.base_optimizer(trainable) if optimizer is None else optimizer
        self._link = OptimizerLink(model, self.optimizer)
        self._quadratic = quadratic_update(method)
        if self._quadratic is not None:
            check_plain_sgd(self.optimizer)
        self._options = {"fisher": fisher, "sharing": sharing, "exclude": exclude, "strict": strict}
        self._curvature = Curvature(method)
        self._captures = Captures(
            model,
            self._curvature,
            tracer=self._trace,
            backend=resolve_backend(backend, guards.model_device(model)),
            modelled=self._quadratic is not None,
        )
        self._pending: Pending | None = None
        self._step = 0

    def __call__(self, inputs: Any, targets: Any = None) -> Tensor:
        """One full training step. Returns the loss before the update: a detached 0-dim tensor.

        Raises `NonFiniteLossError` (nothing changed), `CaptureError`, `InputError`, `ModelChangedError`.
        """
        if self._pending is not None:
            raise KfacFxError(
                "step(...) was called while accumulated batches wait: call step.update() or step.discard()."
            )
        compiled, batch = self._captures.fitting(inputs, targets)
        with self._rolled_back_on_error() as buffers:
            if self._quadratic is not None or self._refresh_due():
                loss = self._collect(compiled, batch)
                self._finish(self._point(compiled, batch, buffers))
                return loss
            variant: Variant = "statistics" if self._statistics_due() else "plain"
            program, outputs = compiled.call(variant, self._arguments(compiled, variant, batch))
            gradients = dict(zip(program.gradients, outputs[3:], strict=False))
            if variant == "statistics":
                tensors = outputs[3 + len(program.gradients) :]
                self._curvature.replace(compiled.plan, dict(zip(program.state_outputs, tensors, strict=True)))
            self._link.apply(gradients)
            self._step += 1
        return outputs[0].detach()

    def accumulate(self, inputs: Any, targets: Any = None) -> Tensor:
        """Gradients and, when due, statistics of one batch, without an update. Returns its loss.

        Batches of a mean loss are weighted by their numbers of loss terms, so that two halves equal the
        whole.
        """
        if self._quadratic is not None:
            raise KfacFxError(
                "quadratic_model=True models the loss of one batch: call step(inputs, targets) with the "
                "whole batch, or use quadratic_model=False to accumulate."
            )
        return self._collect(*self._captures.fitting(inputs, targets))

    def _collect(self, compiled: Compiled, batch: Batch) -> Tensor:
        """Add a batch to those that wait. Returns its loss."""
        variant: Variant = "batch_statistics" if self._statistics_due() else "gradients"
        program, outputs = compiled.call(variant, self._arguments(compiled, variant, batch))
        gradients = dict(zip(program.gradients, outputs[3:], strict=False))
        statistics = dict(zip(program.state_outputs, outputs[3 + len(program.gradients) :], strict=True))
        with torch.no_grad():
            new = Pending.of(compiled.plan, outputs[1], gradients, statistics)
            self._pending = new if self._pending is None else self._pending.joined(new)
        return outputs[0].detach()

    def update(self) -> None:
        """One update for all that was accumulated: statistics, refresh when due, precondition, optimizer."""
        if self._pending is None:
            raise KfacFxError(
                "step.update() has nothing to apply: call step.accumulate(inputs, targets) first."
            )
        self._finish(None)

    def _finish(self, point: Point | None) -> None:
        """Apply the batches that wait. point: where the quadratic model is expanded, for methods with one."""
        pending, quadratic = self._pending, self._quadratic
        assert pending is not None
        method = self.method if quadratic is None else quadratic.method
        plan = replace(pending.plan, method=method)
        with self._rolled_back_on_error(), execution():
            refresh = self._refresh_due()
            if pending.statistics:
                self._curvature.fold(plan, pending.statistics, pending.weight)
            if refresh:
                self._curvature.refresh(method)
            gradients = dict(pending.gradients)
            if quadratic is None or point is None:
                gradients.update(self._precondition(plan, gradients))
            else:
                gradients = quadratic.objective_gradients(gradients, point.parameters(gradients))
                directions = self._precondition(plan, gradients)
                delta = quadratic.update(point, gradients, directions, step=self._step)
                gradients = {name: -tensor for name, tensor in delta.items()}
                check_plain_sgd(self.optimizer)
            self._link.apply(gradients)
            self._step += 1
        self._pending = None

    def discard(self) -> None:
        """Forget the batches that were accumulated and not yet applied."""
        self._pending = None

    @contextmanager
    def _rolled_back_on_error(self) -> Iterator[dict[str, Tensor]]:
        """If anything fails inside, curvature, waiting batches and changed buffers are what they were.

        Gives the old values of the buffers that the model changes.
        """
        before, pending = self._curvature.snapshot(), self._pending
        quadratic = None if self._quadratic is None else self._quadratic.snapshot()
        changing = self._captures.changing_buffers
        buffers = {name: b for name, b in self.model.named_buffers() if name in changing}
        old = {name: buffer.clone() for name, buffer in buffers.items()}
        try:
            yield old
        except BaseException:
            self._curvature.restore(before)
            self._pending = pending
            if self._quadratic is not None and quadratic is not None:
                self._quadratic.restore(quadratic)
            with torch.no_grad():
                for name, buffer in buffers.items():
                    buffer.copy_(old[name])
            raise

    def _point(self, compiled: Compiled, batch: Batch, old: Mapping[str, Tensor]) -> Point | None:
        """The parameters, and the buffers as they were before this step's forward."""
        if compiled.forward is None:
            return None
        buffers = [old.get(name, buffer) for name, buffer in self.model.named_buffers()]
        return Point(forward=compiled.forward, tensors=(*self.model.parameters(), *buffers, *batch.tensors))

    def _precondition(self, plan: Plan, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        names = gradient_names(plan)
        if not names:
            return {}
        keys = _state_keys(plan)
        tensors = [gradients[name] for name in names] + [self._curvature.tensor(*key) for key in keys]
        directions = precondition_function(plan, keys)(*tensors, self._link.learning_rates(plan))
        return dict(zip(names, directions, strict=True))

    @property
    def plan(self) -> Plan:
        """The plan of the first batch shape; `print(step.plan)` is the report."""
        return self._captures.first.plan

    @property
    def graphs(self) -> Mapping[str, GraphModule]:
        """Rewritten graphs of the first batch shape.

        "plain" and "statistics", and for accumulation "gradients" and "batch_statistics".
        """
        return Graphs(self._captures.first)

    @property
    def counts(self) -> Mapping[str, int]:
        """How often factors were retried in float64 and how often the last inverse was kept, since the
        start.
        """
        return {"retried": int(self._curvature.retried), "kept_last": int(self._curvature.kept_last)}

    @property
    def damping(self) -> float:
        """Lambda of the next step; it changes where the method adapts it."""
        if self._quadratic is not None:
            return self._quadratic.damping
        if not isinstance(self.method, DampedMethod):
            raise KfacFxError(f"method {self.method.name!r} has no damping of this kind: read step.method.")
        return self.method.damping

    @property
    def reduction_ratio(self) -> float | None:
        """What the loss fell by at the last adaptation of the damping, relative to what the quadratic model
        predicted; None before the first.
        """
        return None if self._quadratic is None else self._quadratic.ratio

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers alone: loads with `torch.load(..., weights_only=True)`; resuming is
        bit-identical.

        As in PyTorch the tensors are the live ones; parameters and buffers are the model's own `state_dict`.
        """
        if self._pending is not None:
            raise KfacFxError(
                "state_dict() was called while accumulated batches wait: call step.update() first."
            )
        return {
            "step": self._step,
            **self._curvature.state_dict(),
            **({} if self._quadratic is None else {"quadratic": self._quadratic.state_dict()}),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`. Raises `StateError` naming what does not fit this model or method."""
        guards.check_state(state, self.model, self.optimizer)
        if self._quadratic is not None:
            self._quadratic.check_state(state, self.model)
        laid_out_anew = bool(self.method.growing_names)  # thin factors follow the rows of the saved state
        self._curvature.load_state_dict(state, [] if laid_out_anew else self._captures.plans)
        if laid_out_anew:
            self._captures.forget()
        if self._quadratic is not None:
            self._quadratic.load_state_dict(state["quadratic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._step = int(state["step"])

    def _statistics_due(self) -> bool:
        return self._step % self.method.statistics_every == 0 or self._curvature.empty

    def _refresh_due(self) -> bool:
        every = self.method.inverse_every
        return every > 0 and (self._step % every == 0 or self._curvature.empty)

    def _trace(self, batch: Batch) -> Plan:
        self._link.check()
        rows = self._curvature.rows
        return trace(self.model, self.loss_fn, batch, method=self.method, rows=rows, **self._options)

    def _arguments(self, compiled: Compiled, variant: Variant, batch: Batch) -> list[Tensor]:
        program = compiled.program(variant)
        tensors: list[Tensor] = [*self.model.parameters(), *self.model.buffers(), *batch.tensors]
        tensors += [self._curvature.tensor(*key) for key in program.state_inputs]
        if program.has_weight:
            tensors.append(self._curvature.next_weights(compiled.plan))
        if program.has_rates:
            tensors.append(self._link.learning_rates(compiled.plan))
        return tensors


def _state_keys(plan: Plan) -> list[tuple[str, str]]:
    """(key, name) of every state tensor that this plan's layers read."""
    keys = [
        (state_owner(plan, match, name), name)
        for match in plan.matched
        for name in initial_state(plan, match)
    ]
    return list(dict.fromkeys(keys))
