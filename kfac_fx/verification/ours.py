"""What this library computes for the subject: programs of the captured graph, and one step of `TrainStep`.

Enters: a `Subject` and the options of `compile`. Leaves: everything that is compared, by name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from kfac_fx.canonical import initial_state, state_owner
from kfac_fx.contracts import Method
from kfac_fx.curvature import Curvature, Key
from kfac_fx.functions import layer_function
from kfac_fx.instrument import Variant, instrument
from kfac_fx.lower import execution, lower
from kfac_fx.methods import EKFAC
from kfac_fx.planned import Plan
from kfac_fx.step import TrainStep
from kfac_fx.types import LayerMatch, State
from kfac_fx.verification.schedule import shortened
from kfac_fx.verification.twin import Subject, seeded


@final
@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Of one program. buffers: after it ran."""

    loss: Tensor
    inverse_scale: Tensor
    gradients: dict[str, Tensor]
    statistics: dict[Key, Tensor]
    buffers: dict[str, Tensor]


@final
@dataclass(frozen=True, kw_only=True)
class Ours:
    """All results for one batch.

    before, after: state of each layer before the batch, and after its statistics and the first refresh.
    later: statistics of the same batch once more, where they depend on the state. directions: canonical, not
    yet rescaled. stepped: the model after one training step. rate: its learning rate. training: the step
    itself, on a model of its own that is as far.
    """

    plan: Plan
    gradients: Outputs
    statistics: Outputs
    later: Outputs | None
    before: dict[str, State]
    after: dict[str, State]
    directions: dict[str, Tensor]
    stepped: nn.Module
    rate: float
    training: TrainStep


def our_results(subject: Subject, *, method: Method, options: Mapping[str, Any]) -> Ours:
    """Run everything once. options: fisher, sharing, exclude."""
    stepped = subject.fresh()
    method = shortened(method)
    step = TrainStep(
        stepped,
        subject.loss_fn,
        method=method,
        optimizer=None,
        backend="eager",
        strict=False,
        **options,
    )
    with seeded(stepped):
        step(subject.inputs, subject.targets)
    plan, curvature = step.plan, Curvature(method)
    curvature.adopt(plan)
    gradients = run_program(subject, plan, "gradients", curvature)
    before = {match.key: _state(plan, curvature, match) for match in plan.matched}
    statistics = run_program(subject, plan, "batch_statistics", curvature)
    with execution():
        curvature.fold(plan, statistics.statistics, statistics.inverse_scale)
        curvature.refresh(method)
    after = {match.key: _state(plan, curvature, match) for match in plan.matched}
    later = run_program(subject, plan, "batch_statistics", curvature) if isinstance(method, EKFAC) else None
    return Ours(
        plan=plan,
        gradients=gradients,
        statistics=statistics,
        later=later,
        before=before,
        after=after,
        directions={m.key: _direction(plan, m, gradients.gradients, after[m.key]) for m in plan.matched},
        stepped=copy.deepcopy(stepped),
        rate=float(step.optimizer.param_groups[0]["lr"]),
        training=step,
    )


def arguments(subject: Subject) -> list[Tensor]:
    """Parameters, buffers and batch as programs take them; buffers are copies that a program may change."""
    model = subject.model
    fixed = [p.detach() for p in model.parameters()]
    return [*fixed, *(b.clone() for b in model.buffers()), *(t.clone() for t in subject.batch.tensors)]


def run_program(subject: Subject, plan: Plan, variant: Variant, curvature: Curvature) -> Outputs:
    """One of the programs with the state of `curvature`; nothing of it changes."""
    program = instrument(plan, variant, sizes=curvature.sizes())
    given = arguments(subject)
    states = [curvature.tensor(*key) for key in program.state_inputs]
    with seeded(subject.model):
        loss, inverse, _, *rest = lower(program.module, "eager")(*given, *states)
    num = len(program.gradients)
    first = sum(1 for _ in subject.model.parameters())
    return Outputs(
        loss=loss.detach(),
        inverse_scale=inverse,
        gradients=dict(zip(program.gradients, rest, strict=False)),
        statistics=dict(zip(program.state_outputs, rest[num:], strict=True)),
        buffers={name: given[first + i] for i, (name, _) in enumerate(subject.model.named_buffers())},
    )


def _state(plan: Plan, curvature: Curvature, match: LayerMatch) -> State:
    names = initial_state(plan, match)
    return {name: curvature.tensor(state_owner(plan, match, name), name) for name in names}


def _direction(plan: Plan, match: LayerMatch, gradients: Mapping[str, Tensor], state: State) -> Tensor:
    names = [name for name in (match.weight, match.bias) if name is not None]
    run = layer_function(plan, match, names, list(state))
    with torch.no_grad():
        return run(*(gradients[name] for name in names), *state.values())["direction"]
