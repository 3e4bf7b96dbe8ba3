"""`TrainStep`: which program runs now, and the update that its results lead to.

One step: the program of this batch's shapes gives loss and gradients (and statistics when due); inverses are
refreshed when due; the gradients are preconditioned; the optimizer, PyTorch's own, updates the parameters.
Nothing changes unless all succeeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from kfac_fx import guards, host
from kfac_fx.adaptive import Point
from kfac_fx.batch import Batch
from kfac_fx.captures import Captures
from kfac_fx.compiled import Compiled, Graphs, Outputs
from kfac_fx.contents import Contents
from kfac_fx.contracts import Method
from kfac_fx.errors import KfacFxError
from kfac_fx.functions import update_products
from kfac_fx.instrument import Variant
from kfac_fx.live import PROGRAM_PHASES, Journal, StepReport, journaled, observe
from kfac_fx.lower import execution, resolve_backend
from kfac_fx.optimizer import OptimizerLink
from kfac_fx.pending import Pending
from kfac_fx.planned import Plan
from kfac_fx.progress import Progress
from kfac_fx.schedule import Refresh
from kfac_fx.stages import runs
from kfac_fx.trace import trace
from kfac_fx.types import Fisher, LossFn, Sharing
from kfac_fx.watch import Watch


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
        refresh: Refresh = "together",
        without: frozenset[str] = frozenset(),
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.method = method
        guards.check_trainable(model)
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = method.base_optimizer(trainable) if optimizer is None else optimizer
        self._progress = Progress(method, model, staggered=refresh == "staggered")
        self._curvature, self._quadratic = self._progress.curvature, self._progress.quadratic
        modelled = self._quadratic is not None
        runs_behind = host.waits(guards.model_device(model))
        self._watch = Watch(deferred=runs_behind and not modelled)
        self._link = OptimizerLink(model, self.optimizer, whole=modelled)
        self._options = {
            "fisher": fisher,
            "sharing": sharing,
            "exclude": exclude,
            "strict": strict,
            "without": without,
        }
        lowered = resolve_backend(backend, guards.model_device(model))
        self._captures = Captures(
            model,
            self._curvature,
            tracer=self._trace,
            backend=lowered if runs("lower", without) else "eager",
            modelled=modelled,
        )
        self._journal = Journal(self._progress, self._captures, device=guards.model_device(model))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be copied or pickled: a step belongs to its model and optimizer."""
        raise KfacFxError(
            "a step cannot be copied or pickled: copy the model, compile the copy, and give it a copy of "
            "state_dict() by load_state_dict()."
        )

    @journaled
    def __call__(self, inputs: Any, targets: Any = None) -> Tensor:
        """One full training step. Returns the loss before the update: a detached 0-dim tensor.

        Raises `NonFiniteLossError` (nothing changed; on CUDA of an earlier call, whose gradients counted as
        zero), `CaptureError`, `InputError`, `ModelChangedError`.
        """
        if self._progress.pending is not None:
            raise KfacFxError(
                "step(...) was called while accumulated batches wait: call step.update() or step.discard()."
            )
        self._watch.settle()
        contents = Contents.of(self.model)
        compiled, batch = self._captures.fitting(contents, inputs, targets)
        changing = contents.changing(compiled.changing_buffers)
        with self._progress.rolled_back_on_error(changing) as buffers:
            self._progress.begin(self._journal.phase)
            if self._quadratic is not None or self._progress.refresh_due:
                loss = self._collect(contents, compiled, batch)
                self._finish(contents, compiled.point(contents, batch, buffers))
                return loss
            outputs = self._run("statistics", "plain", contents, compiled, batch)
            if outputs.state:
                self._curvature.replace(compiled.plan, outputs.state)
            self._journal.measure(compiled.plan, outputs.products, outputs.rates)
            with self._journal.phase("update"):
                self._link.apply(contents, outputs.gradients)
            self._progress.finished()
        return outputs.loss

    @journaled
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
        self._watch.settle()
        contents = Contents.of(self.model)
        fitting = self._captures.fitting(contents, inputs, targets)
        with self._progress.rolled_back_on_error({}):
            self._progress.begin(self._journal.phase)
            return self._collect(contents, *fitting)

    def _collect(self, contents: Contents, compiled: Compiled, batch: Batch) -> Tensor:
        """Add a batch to those that wait. Returns its loss."""
        outputs = self._run("batch_statistics", "gradients", contents, compiled, batch)
        with torch.no_grad():
            new = Pending.of(compiled.plan, outputs.weight, outputs.gradients, outputs.state, outputs.finite)
            waiting = self._progress.pending
            self._progress.pending = new if waiting is None else waiting.joined(new)
        return outputs.loss

    @journaled
    def update(self) -> None:
        """One update for all that was accumulated: statistics, refresh when due, precondition, optimizer."""
        if self._progress.pending is None:
            raise KfacFxError(
                "step.update() has nothing to apply: call step.accumulate(inputs, targets) first."
            )
        self._watch.settle()
        contents = Contents.of(self.model)
        self._captures.check(contents)
        self._finish(contents, None)

    def _finish(self, contents: Contents, point: Point | None) -> None:
        """Apply the batches that wait. point: where the quadratic model is expanded, for methods with one."""
        pending, quadratic = self._progress.pending, self._quadratic
        assert pending is not None
        changing = contents.changing(self._captures.changing_buffers)
        undone = self._progress.rolled_back_on_error(changing)
        with undone, execution(), host.reading(quadratic is not None):
            plan, rates = pending.plan, partial(self._link.learning_rates, contents)
            plain, gradients = self._progress.directions(point, rates=rates, phase=self._journal.phase)
            if quadratic is None:
                self._journal.measure(plan, update_products(plan, gradients, plain), rates(plan))
            with self._journal.phase("update"):
                self._link.apply(contents, gradients)
            self._progress.finished()

    def discard(self) -> None:
        """Forget the batches that were accumulated and not yet applied."""
        self._progress.discard()

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
        outcomes = self._curvature.outcomes
        return {"retried": int(outcomes.retried), "kept_last": int(outcomes.kept_last)}

    @property
    def damping(self) -> float:
        """Lambda of the next step; it changes where the method adapts it."""
        return self._progress.damping

    @property
    def gamma(self) -> float | None:
        """Gamma of the factored damping of the next step, where the method adapts it apart from lambda."""
        return self._progress.gamma

    @property
    def reduction_ratio(self) -> float | None:
        """What the loss fell by at the last adaptation of the damping, relative to what the quadratic model
        predicted; None before the first. Negative: the loss rose; the update stands and the damping grows.
        """
        return None if self._quadratic is None else self._quadratic.strength.ratio

    def report(self, *, layers: str = "*", max_dim: int = 1024) -> StepReport:
        """How training goes, as a record that prints; waits for the device, and changes nothing.

        layers: pattern (fnmatch) of those whose factors are looked at. max_dim: of larger factors no
        eigenvalues are computed, which cost d^3. Raises `UnknownNameError` if no layer fits.
        """
        notes = self._captures, self._progress, self._journal
        return observe(self.method, *notes, layers=layers, max_dim=max_dim)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers alone: loads with `torch.load(..., weights_only=True)`; resuming is
        bit-identical.

        As in PyTorch the tensors are the live ones; parameters and buffers are the model's own `state_dict`.
        """
        if self._progress.pending is not None:
            raise KfacFxError(
                "state_dict() was called while accumulated batches wait: call step.update() first."
            )
        self._watch.settle(wait=True)
        return {**self._progress.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`. Raises `StateError` naming what does not fit this model or method."""
        guards.check_state(state, self.model, self.optimizer)
        laid_out_anew = bool(self.method.growing_names)  # thin factors follow the rows of the saved state
        self._progress.load_state_dict(state, [] if laid_out_anew else self._captures.plans)
        if laid_out_anew:
            self._captures.forget()
        self.optimizer.load_state_dict(state["optimizer"])
        self._watch.forget()
        self._journal.forget()

    def _trace(self, batch: Batch) -> Plan:
        self._link.check()
        rows = self._curvature.rows
        return trace(self.model, self.loss_fn, batch, method=self.method, rows=rows, **self._options)

    def _run(
        self, collects: Variant, otherwise: Variant, contents: Contents, compiled: Compiled, batch: Batch
    ) -> Outputs:
        """The program that is due. collects: where some layer's statistics are."""
        layers = self._progress.collecting(compiled.plan)
        tensors = [*contents.tensors, *batch.tensors]
        rates = partial(self._link.learning_rates, contents)
        variant = collects if layers else otherwise
        with self._journal.phase(PROGRAM_PHASES[variant]):
            return compiled.call(variant, tensors, rates=rates, watch=self._watch, layers=layers)
