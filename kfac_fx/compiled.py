"""One captured batch shape: its plan, its programs, and how one is run so that it can fail safely.

Enters: a plan; parameters, buffers, a batch. Leaves: outputs by name, or on failure the buffers as they were.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor
from torch.fx import GraphModule

from kfac_fx import guards, stages
from kfac_fx.adaptive import Point
from kfac_fx.batch import Batch
from kfac_fx.contents import Contents
from kfac_fx.curvature import Curvature, Key, Rates
from kfac_fx.forward import Forward
from kfac_fx.host import zeros_unless
from kfac_fx.instrument import VARIANTS, Program, Variant, instrument
from kfac_fx.lower import lower, mutated_placeholders
from kfac_fx.planned import Plan
from kfac_fx.watch import Watch

Which = tuple[Variant, frozenset[str] | None]  # and the layers whose statistics it collects, None for all


@final
@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What a program returned.

    loss: detached, 0-dim. weight: 1/R_ of it. gradients: preconditioned if the variant does that. state: new
    state tensors, or the batch's statistics. finite: whether loss and gradients are, 0-dim, if that is not
    known; gradients and state of a program that preconditions are then zero and the old, unless it is True.
    products, rates: <V, grad> and learning rate of each layer, [layers]; None if the variant has none.
    """

    loss: Tensor
    weight: Tensor
    gradients: dict[str, Tensor]
    state: dict[Key, Tensor]
    finite: Tensor | None
    products: Tensor | None
    rates: Tensor | None


@final
@dataclass(kw_only=True)
class Compiled:
    """One captured batch shape: its plan and the programs written so far.

    forward: the forward alone, where the method uses the quadratic model.
    """

    plan: Plan
    backend: str
    curvature: Curvature
    forward: Forward | None = None
    sizes: dict[Key, tuple[int, ...]] = field(default_factory=dict)
    programs: dict[Which, Program] = field(default_factory=dict)
    callables: dict[Which, Any] = field(default_factory=dict)
    mutated: dict[Which, tuple[int, ...]] = field(default_factory=dict)

    def which(self, variant: Variant, layers: frozenset[str] | None = None) -> Which:
        """The key of a program. layers: those whose statistics it collects; None for all."""
        every = layers is None or len(layers) == len(self.plan.matched)
        collects = variant in ("statistics", "batch_statistics")
        return variant, None if every or not collects else layers

    def program(self, which: Which) -> Program:
        """The program, written at its first use, and again if a thin factor has grown."""
        if self.sizes != (sizes := self.curvature.sizes()):
            self.sizes = sizes
            self.programs.clear()
            self.callables.clear()
        if which not in self.programs:
            program = instrument(self.plan, which[0], sizes=self.sizes, layers=which[1])
            self.programs[which] = program
            self.mutated[which] = mutated_placeholders(program.module)
        return self.programs[which]

    @functools.cached_property
    def changing_buffers(self) -> frozenset[str]:
        """Names of the buffers that running the model changes in place."""
        names = [*(p.name for p in self.plan.capture.parameters), *self.plan.capture.buffers]
        return frozenset(names[i] for i in mutated_placeholders(self.plan.capture.graph))

    def point(self, contents: Contents, batch: Batch, old: Mapping[str, Tensor]) -> Point | None:
        """Where the model is for the quadratic model: parameters, buffers (those of `old` as they were before
        this step's forward), batch.
        """
        if self.forward is None:
            return None
        buffers = [old.get(name, buffer) for name, buffer in contents.buffers.items()]
        tensors = (*contents.parameters.values(), *buffers, *batch.tensors)
        return Point(forward=self.forward, tensors=tensors)

    def call(
        self,
        variant: Variant,
        tensors: Sequence[Tensor],
        *,
        rates: Rates,
        watch: Watch,
        layers: frozenset[str] | None = None,
    ) -> Outputs:
        """Run a variant; if it raises or its loss is not finite, buffers get their old values back.

        tensors: parameters, buffers and the batch. layers: those whose statistics are collected. A loss that
        gives a layer its first statistics, or makes a thin factor grow, is checked at once.
        """
        which = self.which(variant, layers)
        program = self.program(which)
        arguments = [*tensors, *(self.curvature.tensor(*key) for key in program.state_inputs)]
        if program.has_weight:
            arguments.append(self.curvature.next_weights(self.plan))
        of_layers = rates(self.plan) if program.has_rates or program.has_products else None
        if of_layers is not None and program.has_rates:
            arguments.append(of_layers)
        first = which not in self.callables
        saved = [(arguments[i], arguments[i].clone()) for i in self.mutated[which]]
        try:
            outputs = self._first(which, program, arguments) if first else self.callables[which](*arguments)
            returned = program.returned(outputs)
            found = Outputs(
                loss=returned.loss.detach(),
                weight=returned.inverse_scale,
                gradients=returned.gradients,
                state=returned.state,
                finite=watch.check(
                    returned.loss, returned.check, at_once=self._replaces(variant, returned.state)
                ),
                products=returned.products,
                rates=of_layers,
            )
            return found if found.finite is None else self._guarded(found, found.finite, saved, program)
        except BaseException:
            with torch.no_grad():
                for tensor, old in saved:
                    tensor.copy_(old)
            raise

    def _replaces(self, variant: Variant, state: Mapping[Key, Tensor]) -> bool:
        """Whether nothing could stand in for the new state: the first one, or a thin factor that grew."""
        grew = any(self.sizes.get(key, new.shape) != new.shape for key, new in state.items())
        return self.curvature.empty or (variant == "statistics" and grew)

    def _first(self, which: Which, program: Program, arguments: Sequence[Tensor]) -> Sequence[Tensor]:
        """Lower a program and run it for the first time, which is when inductor compiles it."""
        with stages.running("lower", program.module.graph.nodes) as running:
            running.did = f"{program.variant}: {self.backend}, with its first run"
            run = lower(program.module, self.backend)
            outputs = guards.first_run(run, arguments, self.plan)
        self.callables[which] = run
        return outputs

    def _guarded(
        self, found: Outputs, finite: Tensor, saved: Sequence[tuple[Tensor, Tensor]], program: Program
    ) -> Outputs:
        """Outputs that change nothing if they are not finite; buffers as they were. saved: buffers, old."""
        with torch.no_grad():
            for tensor, old in saved:
                tensor.copy_(torch.where(finite, tensor, old))
            if program.variant not in ("plain", "statistics"):
                return found
            old_state = {key: self.curvature.tensor(*key) for key in found.state}
            state = {key: torch.where(finite, new, old_state[key]) for key, new in found.state.items()}
            products = None if found.products is None else found.products.masked_fill(~finite, 0.0)
            gradients = zeros_unless(finite, found.gradients)
            return replace(found, gradients=gradients, state=state, products=products)


@final
class Graphs(Mapping[str, GraphModule]):
    """Variants of one captured batch shape, written on demand."""

    def __init__(self, compiled: Compiled) -> None:
        self._compiled = compiled

    def __getitem__(self, name: str) -> GraphModule:
        """The rewritten graph of that variant."""
        if name not in VARIANTS:
            raise KeyError(name)
        return self._compiled.program((name, None)).module  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[str]:
        """Names of the variants."""
        return iter(VARIANTS)

    def __len__(self) -> int:
        """Number of variants."""
        return len(VARIANTS)
