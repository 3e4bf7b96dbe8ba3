"""The passes that collect: the check of the gradients, each layer's statistics, and their moving averages.

Enters: the `Draft` of a program. Leaves: the same with more nodes, and what was done in words. Called by
`instrument`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from kfac_fx import stages
from kfac_fx.canonical import batch_names, state_owner
from kfac_fx.draft import Draft
from kfac_fx.functions import fold_function, reader_nodes, signature, statistics_function, use_nodes
from kfac_fx.types import LayerMatch
from kfac_fx.writer import of_layer


def write_guard(draft: Draft) -> str:
    """One number that is finite if and only if all gradients are."""

    def run(*tensors: Tensor) -> dict[str, Tensor]:
        real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
        sums = [t.sum(dtype=torch.promote_types(t.dtype, torch.float32)) for t in real]
        return {"check": torch.stack(sums).sum(dtype=torch.float64)}

    gradients = list(draft.gradients.values())
    label = "finite if all gradients are"
    draft.check = draft.writer.splice(run, gradients, label=label, names={"check": "check"}, key=("check",))[
        "check"
    ]
    return f"1/R_, and a check of {len(gradients)} gradients"


def write_statistics(draft: Draft) -> str:
    """This batch's statistics of the draft's layers, beside their weight gradients."""
    plan, collected = draft.plan, set()
    for match in plan.matched:
        if match.key not in draft.layers:
            continue
        owners = {name: (state_owner(plan, match, name), name) for name in batch_names(plan, match)}
        wanted = tuple(name for name, key in owners.items() if key not in collected)
        if not wanted:
            continue
        collected |= {owners[name] for name in wanted}
        results = _write_layer_statistics(draft, match, wanted)
        draft.batch_state |= {owners[name]: node for name, node in results.items()}
    return f"{len(collected)} statistics of {draft.writer.told(len(draft.batches))}"


def _write_layer_statistics(draft: Draft, match: LayerMatch, wanted: tuple[str, ...]) -> dict[str, Node]:
    """Those of one layer. wanted: their names."""
    plan, writer = draft.plan, draft.writer
    read = [*use_nodes(match), plan.capture.inverse_scale, *reader_nodes(plan, match)]
    place, alike = writer.after(read), signature(plan, match)
    named = draft.sizes_of(match, wanted)
    results = writer.splice(
        statistics_function(plan, match, wanted),
        [*map(writer.of, read), *writer.states(match).values()],
        label=f"{named} of {match.name}",
        before=place,
        match=match,
        names={name: f"batch_{name}" for name in wanted},
        key=alike and ("statistics", alike, wanted),
    )
    draft.batches.append((match, results, place.prev))
    stages.detail("statistics", match.name, "%s behind %s", named, place.prev)
    return results


def write_averages(draft: Draft) -> str:
    """The statistics become new state, right behind where they are computed."""
    plan, writer = draft.plan, draft.writer
    if not plan.matched:
        return "no layers"
    draft.weight = writer.placeholder("weights", (len(plan.matched),), "share of this batch, per layer")
    weights = _apart(draft, draft.weight)
    scale = writer.of(plan.capture.inverse_scale)
    for match, batch, last in draft.batches:
        alike, states = signature(plan, match), writer.states(match)
        results = writer.splice(
            fold_function(plan, match, tuple(batch)),
            [*batch.values(), *states.values(), scale, weights[match.key]],
            label=f"new state of {match.name}",
            before=last.next,
            match=match,
            names={name: f"new_{name}" for name in states},
            key=alike and ("fold", alike, tuple(batch)),
        )
        draft.state |= {(state_owner(plan, match, name), name): node for name, node in results.items()}
        stages.detail("averages", match.name, "new %s", ", ".join(results))
    return f"{len(draft.state)} state tensors of {draft.writer.told(len(draft.batches))}"


def _apart(draft: Draft, weights: Node) -> dict[str, Node]:
    """Each layer's weight, by key."""
    keys = [match.key for match in draft.plan.matched]

    def run(tensor: Tensor) -> dict[str, Tensor]:
        return dict(zip(keys, tensor.unbind(), strict=True))

    names = {match.key: of_layer(match, "share") for match in draft.plan.matched}
    return draft.writer.splice(run, [weights], label="share of this batch", before=weights.next, names=names)
