"""Writes a plan into the captured graph.

Enters: a `Plan`. Leaves: `Program`s, one fx graph per variant, whose mathematics is ordinary torch functions
traced and spliced beside the weight gradients they belong to. Loss and gradients stay the nodes that were
captured.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kfac_fx.canonical import batch_names, from_matrices, gradient_names, initial_state, state_owner
from kfac_fx.contracts import Plan
from kfac_fx.functions import (
    fold_function,
    layer_function,
    reader_nodes,
    signature,
    statistics_function,
    use_nodes,
)
from kfac_fx.types import LayerMatch
from kfac_fx.writer import GraphWriter, Key

Variant = Literal["plain", "statistics", "gradients", "batch_statistics"]
VARIANTS: tuple[Variant, ...] = ("plain", "statistics", "gradients", "batch_statistics")


@final
@dataclass(frozen=True, kw_only=True)
class Program:
    """One variant of the training step.

    module: placeholders are those of the capture, then `state_inputs` in order, then `weights` ([layers],
    share of the new batch in the moving averages) and `learning_rates` ([layers]) where the variant uses
    them. Outputs: loss, 1/R_, a check (finite if all gradients are), gradients in the order of `gradients`,
    then new tensors in the order of `state_outputs`.
    """

    variant: Variant
    module: GraphModule
    state_inputs: tuple[Key, ...]
    state_outputs: tuple[Key, ...]
    gradients: tuple[str, ...]
    has_weight: bool
    has_rates: bool


def instrument(
    plan: Plan,
    variant: Variant,
    *,
    sizes: Mapping[Key, Sequence[int]] | None = None,
    layers: Collection[str] | None = None,
) -> Program:
    """Write one variant.

    sizes: shapes of state tensors that are not those of `Method.init` (thin factors that have grown). layers:
    keys of those whose statistics are collected, with all that share a tensor with them; None for all.

    plain: forward, backward, precondition. statistics: the same plus the moving averages of the factors.
    gradients: forward and backward alone. batch_statistics: forward, backward and this batch's statistics,
    not yet averaged (for accumulation).
    """
    capture, num_layers = plan.capture, len(plan.matched)
    preconditions = variant in ("plain", "statistics")
    collects = variant in ("statistics", "batch_statistics")
    writer = GraphWriter(plan, sizes or {})
    if collects or preconditions:
        writer.add_states()
    weight = None
    if variant == "statistics":
        weight = writer.placeholder("weights", (num_layers,), "share of this batch, per layer")
    gradients = {name: writer.of(node) for name, node in capture.gradients.items()}
    check = _gradient_check(writer, list(gradients.values()))
    chosen = [m.key for m in plan.matched] if layers is None else layers
    new_state = _write_statistics(writer, weight, chosen) if collects else {}
    rates = None
    if preconditions and plan.matched:
        rates = writer.placeholder("learning_rates", (num_layers,), "learning rate of each layer")
        gradients |= _write_precondition(writer, rates, new_state)
    loss, scale = writer.of(capture.loss), writer.of(capture.inverse_scale)
    read = writer.finish([loss, scale, check, *gradients.values(), *new_state.values()], collects=collects)
    return Program(
        variant=variant,
        module=writer.module,
        state_inputs=read,
        state_outputs=tuple(new_state),
        gradients=tuple(gradients),
        has_weight=weight is not None,
        has_rates=rates is not None,
    )


def _write_statistics(writer: GraphWriter, weight: Node | None, layers: Collection[str]) -> dict[Key, Node]:
    """Statistics of these layers beside their weight gradients: what they change in the state.

    Without `weight` those of the batch alone.
    """
    plan = writer.plan
    new: dict[Key, Node] = {}
    collected: set[Key] = set()
    weights: list[Node | None] = [None] * len(plan.matched)
    if weight is not None and plan.matched:
        weights = list(_apart(writer, weight))
    for match, own in zip(plan.matched, weights, strict=True):
        if match.key not in layers:
            continue
        owners = {name: (state_owner(plan, match, name), name) for name in batch_names(plan, match)}
        wanted = tuple(name for name, key in owners.items() if key not in collected)
        if wanted:
            collected |= {owners[name] for name in wanted}
            new |= _write_layer_statistics(writer, match, wanted, own)
    return new


def _apart(writer: GraphWriter, weights: Node) -> Iterable[Node]:
    """Each layer's weight."""

    def run(tensor: Tensor) -> dict[str, Tensor]:
        return {str(place): weight for place, weight in enumerate(tensor.unbind())}

    return writer.splice(run, [weights], label="share of this batch", before=weights.next).values()


def _write_layer_statistics(
    writer: GraphWriter, match: LayerMatch, wanted: tuple[str, ...], weight: Node | None
) -> dict[Key, Node]:
    """Those of one layer. wanted: their names. weight: the layer's."""
    plan, states = writer.plan, writer.states(match)
    read = [*use_nodes(match), plan.capture.inverse_scale, *reader_nodes(plan, match)]
    place, alike = writer.after(read), signature(plan, match)
    results = writer.splice(
        statistics_function(plan, match, wanted),
        [*map(writer.of, read), *states.values()],
        label=f"{', '.join(_named(plan, match, wanted))} of {match.name}",
        before=place,
        source=match.source,
        key=alike and ("statistics", alike, wanted),
    )
    if weight is not None:
        results = writer.splice(
            fold_function(plan, match, wanted),
            [*results.values(), *states.values(), writer.of(plan.capture.inverse_scale), weight],
            label=f"new state of {match.name}",
            before=place,
            source=match.source,
            key=alike and ("fold", alike, wanted),
        )
    return {(state_owner(plan, match, name), name): node for name, node in results.items()}


def _gradient_check(writer: GraphWriter, gradients: list[Node]) -> Node:
    """One number that is finite if and only if all gradients are."""

    def run(*tensors: Tensor) -> dict[str, Tensor]:
        real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
        sums = [t.sum(dtype=torch.promote_types(t.dtype, torch.float32)) for t in real]
        return {"check": torch.stack([total.to(torch.float64) for total in sums]).sum()}

    return writer.splice(run, gradients, label="finite if all gradients are", key="check")["check"]


def _write_precondition(writer: GraphWriter, rates: Node, changed: Mapping[Key, Node]) -> dict[str, Node]:
    """Replace each matched gradient by its preconditioned direction.

    changed: state tensors that the statistics of this step have replaced.

    Layer by layer; then the length of all is bounded or restored, and each goes back to its parameter.
    """
    plan = writer.plan
    names = gradient_names(plan)
    read = {name: writer.of(plan.capture.gradients[name]) for name in names}
    matrices, directions = [], []
    for match in plan.matched:
        own = {name: read[name] for name in (match.weight, match.bias) if name is not None}
        state = {
            name: changed.get((state_owner(plan, match, name), name), node)
            for name, node in writer.states(match).items()
        }
        alike = signature(plan, match)
        result = writer.splice(
            layer_function(plan, match, list(own), list(state)),
            [*own.values(), *state.values()],
            label=f"preconditioned gradient of {match.name}",
            source=match.source,
            key=alike and ("precondition", alike),
        )
        matrices.append(result["gradient"])
        directions.append(result["direction"])

    def rescale(*tensors: Tensor) -> dict[str, Tensor]:
        half = len(tensors) // 2
        gradients, rates = list(tensors[half : 2 * half]), tensors[-1]
        scaled = plan.method.rescale(list(tensors[:half]), gradients, learning_rates=rates)
        return {match.key: direction for match, direction in zip(plan.matched, scaled, strict=True)}

    label = f"length of the update by {plan.method.name}"
    scaled = writer.splice(rescale, [*directions, *matrices, rates], label=label, key="rescale")

    def back(*tensors: Tensor) -> dict[str, Tensor]:
        gradients = dict(zip(names, tensors, strict=False))
        return from_matrices(plan, tensors[len(names) :], gradients)

    arguments = [*read.values(), *scaled.values()]
    return writer.splice(back, arguments, label="back to the parameters' shapes", key="back")


def _named(plan: Plan, match: LayerMatch, names: Sequence[str]) -> list[str]:
    """The statistics with their sizes, where the state has a tensor of that name."""
    state = initial_state(plan, match)
    return [f"{n} {'x'.join(map(str, state[n].shape))}" if n in state else n for n in names]
