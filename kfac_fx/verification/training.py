"""Later steps of one training run of this library: plain, statistics, and a refresh, on other batches.

Enters: a `TrainStep` that has made its first step, on the schedule of `schedule.KINDS`. Leaves: what was
given to the optimizer at each step, the state before and after, and what eager PyTorch computes there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from kfac_fx.errors import NonFiniteLossError
from kfac_fx.graph import tree_map
from kfac_fx.methods import NKFAC
from kfac_fx.planned import Plan
from kfac_fx.step import TrainStep
from kfac_fx.types import State
from kfac_fx.verification.eager import Plain, plain_step
from kfac_fx.verification.graph_rows import Values, node_values
from kfac_fx.verification.ours import arguments
from kfac_fx.verification.schedule import KINDS, Kind, kind_of
from kfac_fx.verification.twin import Subject, seeded


@final
@dataclass(frozen=True, kw_only=True)
class Ran:
    """One later step. number: counted from one. values: of graph nodes, where it collects statistics.

    saved: as `TrainStep.state_dict` before it. before, after: state by layer. applied: what the optimizer
    got. buffers, loss: after and of the step. subject: the model before it, with this batch.
    """

    number: int
    kind: Kind
    subject: Subject
    saved: Mapping[str, Any]
    plain: Plain
    values: Values | None
    before: Mapping[str, State]
    after: Mapping[str, State]
    applied: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    loss: Tensor

    @property
    def told(self) -> str:
        """For messages."""
        return f"step {self.number} ({self.kind})"


@final
@dataclass(frozen=True, kw_only=True)
class Stopped:
    """Why there are no more steps. violated: whether that is an error of this library."""

    reason: str
    violated: bool


def later_steps(subject: Subject, step: TrainStep) -> tuple[list[Ran], Stopped | None]:
    """All steps but the first, or those until one fails."""
    ran: list[Ran] = []
    for index in range(1, len(KINDS)):
        if isinstance(step.method, NKFAC) and kind_of(index, step.method) == "refresh":
            _pretend_refreshes(step, step.method)
        again = kind_of(index, step.method) == "plain" and any(one.kind == "plain" for one in ran)
        found = _unwatched(step, ran[-1].subject) if again else _step(subject, step, index)
        if isinstance(found, Stopped):
            return ran, found
        if found is not None:
            ran.append(found)
    return ran, None


def _unwatched(step: TrainStep, subject: Subject) -> Stopped | None:
    """A step whose program has been watched before, with the batch of the last one: towards the refresh."""
    try:
        _recorded(step, subject)
    except NonFiniteLossError as error:
        return Stopped(reason=_first_line(error), violated=False)
    except Exception as error:  # any: it is what is being looked for
        return Stopped(reason=f"a second plain step raised {_first_line(error)}", violated=True)
    return None


def newton_count(method: NKFAC) -> int:
    """A number of earlier refreshes with which the next one is by Newton steps, where there is one."""
    return 3 if 3 % method.exact_every else 4


def _pretend_refreshes(step: TrainStep, method: NKFAC) -> None:
    """The first refreshes of NKFAC are exact: let the next one be a later one."""
    state = step.state_dict()
    refreshes = dict.fromkeys(state["counts"]["refreshes"], newton_count(method))
    step.load_state_dict({**state, "counts": {**state["counts"], "refreshes": refreshes}})


def _step(subject: Subject, step: TrainStep, index: int) -> Ran | Stopped:
    plan, number, kind = step.plan, index + 1, kind_of(index, step.method)
    inputs, targets = resampled((subject.inputs, subject.targets), plan, index)
    here = replace(subject, model=copy.deepcopy(step.model), inputs=inputs, targets=targets)
    where = f"step {number} ({kind})"
    try:
        plain = plain_step(here)
    except Exception as error:  # whatever a model does with a batch of other examples
        return Stopped(reason=f"the model fails at {where}: {_first_line(error)}", violated=False)
    if not math.isfinite(float(plain.loss)):
        return Stopped(reason=f"the loss is not finite at {where}", violated=False)
    saved, before = step.state_dict(), _states(step)
    try:
        loss, applied = _recorded(step, here)
    except Exception as error:  # any: it is what is being looked for
        return Stopped(reason=f"{where} raised {_first_line(error)}", violated=True)
    with seeded(here.model):
        values = None if kind == "plain" else node_values(plan, arguments(here))
    buffers = {name: buffer.detach().clone() for name, buffer in step.model.named_buffers()}
    return Ran(
        number=number,
        kind=kind,
        subject=here,
        saved=saved,
        plain=plain,
        values=values,
        before=before,
        after=_states(step),
        applied=applied,
        buffers=buffers,
        loss=loss,
    )


def resampled(batch: Any, plan: Plan, index: int) -> Any:
    """Half of the examples, each twice, other ones at each step: a batch that the model surely accepts."""
    num = plan.capture.loss_info.examples
    half = torch.arange(num) // 2 + index * max(1, num // len(KINDS))

    def chosen(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != num:
            return leaf
        return torch.empty_like(leaf).copy_(leaf[(half % num).to(leaf.device)])

    return tree_map(chosen, batch)


def _recorded(step: TrainStep, subject: Subject) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, gradients as the optimizer got them) of one step."""
    applied: dict[str, Tensor] = {}

    def record(*_: Any) -> None:
        for name, p in step.model.named_parameters():
            if p.grad is not None:
                applied[name] = p.grad.detach().clone()

    hook = step.optimizer.register_step_pre_hook(record)
    try:
        with seeded(step.model):
            loss = step(subject.inputs, subject.targets)
    finally:
        hook.remove()
    return loss, applied


def _states(step: TrainStep) -> dict[str, State]:
    return {key: dict(state) for key, state in step.state_dict()["curvature"].items()}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
