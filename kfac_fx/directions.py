"""The passes between the gradients and the optimizer: each layer's direction, the length of the update, and
what both have in common.

Enters: the `Draft` of a program. Leaves: the same with more nodes, and what was done in words. Called by
`instrument`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

from torch import Tensor
from torch.fx import Node

from kfac_fx import stages
from kfac_fx.canonical import from_matrices, gradient_names, state_owner
from kfac_fx.draft import Draft
from kfac_fx.functions import layer_function, products, signature
from kfac_fx.planned import Plan
from kfac_fx.stacking import groups, stacked, stacking_pays
from kfac_fx.types import LayerMatch
from kfac_fx.wording import counted
from kfac_fx.writer import identifier, of_layer


def write_precondition(draft: Draft) -> str:
    """Replace each matched gradient by its preconditioned direction: layer by layer, small ones together."""
    plan, writer = draft.plan, draft.writer
    names = gradient_names(plan)
    draft.raw = {name: writer.of(plan.capture.gradients[name]) for name in names}
    read = {match.key: _read(draft, match) for match in plan.matched}
    found: dict[str, Mapping[str, Node]] = {}
    num_stacked = 0
    for group in groups(plan, read):
        results = _write_stacked(draft, group, read) if len(group) > 1 else None
        num_stacked += len(group) if results else 0
        found |= results or {match.key: _write_layer(draft, match, read[match.key]) for match in group}
    told = f"directions of {writer.told(len(found))}"
    for match in plan.matched:
        draft.matrices.append(found[match.key]["gradient"])
        draft.directions.append(draft.distinct(found[match.key]["direction"], match))
        stages.detail("precondition", match.name, "%s", draft.directions[-1])
    if plan.matched:
        _write_back(draft, names)
    return f"{told}, {num_stacked} in stacks" if num_stacked else told


def _read(draft: Draft, match: LayerMatch) -> list[Node]:
    """What the layer's preconditioner may read: gradients of its parameters, then its state."""
    own = [draft.raw[name] for name in _parameters(match)]
    state = draft.writer.states(match)
    return own + [
        draft.state.get((state_owner(draft.plan, match, name), name), state[name]) for name in state
    ]


def _function(draft: Draft, match: LayerMatch) -> Callable[..., dict[str, Tensor]]:
    """What `_read` gives -> canonical gradient and direction."""
    return layer_function(draft.plan, match, _parameters(match), list(draft.writer.states(match)))


def _parameters(match: LayerMatch) -> list[str]:
    return [name for name in (match.weight, match.bias) if name is not None]


def _write_layer(draft: Draft, match: LayerMatch, read: Sequence[Node]) -> dict[str, Node]:
    """Canonical gradient and direction of one layer."""
    alike = signature(draft.plan, match)
    return draft.writer.splice(
        _function(draft, match),
        read,
        label=f"preconditioned gradient of {match.name}",
        match=match,
        names={"gradient": "gradient", "direction": "direction"},
        key=alike and ("precondition", alike),
    )


def _write_stacked(
    draft: Draft, group: Sequence[LayerMatch], read: Mapping[str, Sequence[Node]]
) -> dict[str, dict[str, Node]] | None:
    """Those of layers that compute the same, in one call; None where that does not pay or cannot be done."""
    writer, first, alike = draft.writer, group[0], signature(draft.plan, group[0])
    one = _function(draft, first)
    if not stacking_pays(len(group), writer.traced(one, read[first.key], ("precondition", alike))):
        return None
    whats = ("gradient", "direction")
    try:
        found = writer.splice(
            stacked(one, len(group)),
            [node for match in group for node in read[match.key]],
            label=f"preconditioned gradients of {first.name} and {len(group) - 1} like it",
            names={f"{what} {i}": of_layer(match, what) for i, match in enumerate(group) for what in whats},
            key=("stacked", len(group), alike),
        )
    except Exception as error:  # one alone was traced just now: a method of the user's that has no such form
        stages.note("precondition", f"{first.name} and {len(group) - 1} like it, not in a stack: {error}")
        return None
    results = {m.key: {what: found[f"{what} {i}"] for what in whats} for i, m in enumerate(group)}
    for key, nodes in results.items():
        for node in nodes.values():
            node.meta["kfac_fx_result_of"] = key
    return results


def _write_back(draft: Draft, names: Sequence[str]) -> None:
    """Directions in the shapes of their parameters."""
    plan, writer = draft.plan, draft.writer

    def back(*tensors: Tensor) -> dict[str, Tensor]:
        gradients = dict(zip(names, tensors, strict=False))
        return from_matrices(plan, tensors[len(names) :], gradients)

    last = writer.end.prev
    draft.gradients |= writer.splice(
        back,
        [*draft.raw.values(), *draft.directions],
        label="back to the parameters' shapes",
        names={name: f"update_{identifier(name)}" for name in names},
        key=_key("back", plan),
    )
    draft.back = tuple(_between(last, writer.end))


def _key(what: str, plan: Plan) -> Hashable:
    """Equal for plans in which this function of all layers is the same."""
    alike = tuple((match.key, match.weight, match.bias, signature(plan, match)) for match in plan.matched)
    return what if any(layer[-1] is None for layer in alike) else (what, alike)


def _between(first: Node, end: Node) -> Iterable[Node]:
    """Nodes behind the first and before the end."""
    node = first.next
    while node is not end:
        yield node
        node = node.next


def write_lengths(draft: Draft) -> str:
    """Bound or restore the length of all directions, before they take the parameters' shapes."""
    plan, writer = draft.plan, draft.writer
    if not plan.matched:
        return "no layers"
    draft.rates = writer.placeholder("learning_rates", (len(plan.matched),), "learning rate of each layer")

    def rescale(*tensors: Tensor) -> dict[str, Tensor]:
        half = len(tensors) // 2
        gradients, rates = list(tensors[half : 2 * half]), tensors[-1]
        scaled = plan.method.rescale(list(tensors[:half]), gradients, learning_rates=rates)
        return {match.key: direction for match, direction in zip(plan.matched, scaled, strict=True)}

    scaled = writer.splice(
        rescale,
        [*draft.directions, *draft.matrices, draft.rates],
        label=f"length of the update by {plan.method.name}",
        before=draft.back[0] if draft.back else None,
        names={match.key: of_layer(match, "scaled") for match in plan.matched},
        key=_key("rescale", plan),
    )
    changed = sum(a is not b for a, b in zip(draft.directions, scaled.values(), strict=True))
    draft.rescaled(dict(zip(draft.directions, scaled.values(), strict=True)))
    return f"{changed} of {len(scaled)} directions by {plan.method.name}"


def write_products(draft: Draft) -> str:
    """What the directions, as they go to the optimizer, have in common with the gradients."""
    if not draft.directions:
        return "no layers"
    num = len(draft.directions)
    draft.products = draft.writer.splice(
        lambda *tensors: {"products": products(tensors[:num], tensors[num:])},
        [*draft.directions, *draft.matrices],
        label="<V, grad> of each layer",
        names={"products": "products"},
        key=("products",),
    )["products"]
    return f"<V, grad> of {counted(num, 'layer')}"
