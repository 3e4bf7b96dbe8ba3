"""`Matches` + method -> frozen `Plan`.

Which factors are kept, what they cost, what is left to the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils.flop_counter import flop_registry

from kfac_fx.canonical import state_dtype
from kfac_fx.contracts import Method
from kfac_fx.errors import Reason, UnsupportedModelError
from kfac_fx.forms import by_rows
from kfac_fx.graph import aten, is_op, shape, value
from kfac_fx.planned import Plan
from kfac_fx.traced import Capture
from kfac_fx.types import Fisher, LayerMatch, Matches, Sharing, Skip, Use


def make_plan(
    capture: Capture,
    matches: Matches,
    method: Method,
    *,
    fisher: Fisher,
    sharing: Sharing,
    render: Callable[[Plan], str],
    rows: Mapping[str, tuple[int, int]],
    without: frozenset[str] = frozenset(),
) -> Plan:
    """Decide for every match; layers that the method refuses or whose factors exceed its limit become skips.

    rows: (rows, examples) of the batch that laid out a layer's state, by key, where there is one. without:
    passes that are switched off.
    """
    kept: list[LayerMatch] = []
    refused: dict[str, Skip] = {}
    for match in matches.matched:
        laid_out = replace(match, state_rows=rows.get(match.key), sharing=sharing)
        if capture.loss_info.ignores and sharing == "expand":
            laid_out = replace(laid_out, uses=tuple(_by_rows(use, match) for use in match.uses))
        why = _refusal(laid_out, method)
        if why is None:
            kept.append(laid_out)
        else:
            refused.update({skip.parameter: skip for skip in _skips(capture, match, *why)})
    matches = Matches(matched=_reown(kept), skipped=(*matches.skipped, *refused.values()))
    plan = Plan(
        capture=capture,
        matches=matches,
        method=method,
        factors=(),
        fisher=fisher,
        sharing=sharing,
        model_flops=_flops(_model_nodes(capture)),
        fisher_flops=0,
        render=render,
        without=without,
    )
    if plan.rounds_rows:
        _check_rounding(plan)
    specs = [spec for m in matches.matched for spec in method.factors(m, dtype=state_dtype(plan, m))]
    return replace(plan, factors=tuple(specs), fisher_flops=_flops(_fisher_nodes(plan)))


def _by_rows(use: Use, match: LayerMatch) -> Use:
    """A convolution of several positions takes patches if the loss may ignore some: rows can be left out."""
    if use.geometry is None or use.a is None or math.prod(shape(use.g[0])[2:]) == 1:
        return use
    channels, device = match.groups * match.channels, value(use.a).device.type
    cost = by_rows(use.geometry, examples=match.examples, channels=channels, device=device)
    chosen = {"form": cost.form, "estimated_ns": round(cost.time), "masked": True}
    return replace(use, options={**use.options, **chosen})


def _check_rounding(plan: Plan) -> None:
    """Rounding the rows of a float64 layer to bfloat16 is refused: it would hide what float64 is for."""
    for match in plan.matched:
        if state_dtype(plan, match) == torch.float64:
            raise UnsupportedModelError(
                f"statistics_precision='bfloat16': parameter {match.weight!r} is float64. Convert the model "
                "with model.float(), or keep statistics_precision='full'."
            )


def _largest(match: LayerMatch, method: Method) -> int:
    """Side length of the largest square matrix in the state; thin factors have none."""
    state = method.init(match, dtype=torch.float32, device=torch.device("meta"))
    squares = [t.shape[-1] for t in state.values() if t.dim() > 1 and t.shape[-1] == t.shape[-2]]
    return max(squares, default=1)


def _reown(kept: list[LayerMatch]) -> tuple[LayerMatch, ...]:
    """If the owner of a shared A was too large, the next reader owns it.

    A layer whose state was laid out by another batch size keeps its own: thin factors differ in shape.
    """
    owners: dict[object, str] = {}
    return tuple(replace(m, shared_a=owners.setdefault((m.shared_a, m.laid_out), m.key)) for m in kept)


def _refusal(match: LayerMatch, method: Method) -> tuple[Reason, str] | None:
    refused = method.refuses(match)
    if refused is not None:
        return Reason.METHOD, refused
    largest = _largest(match, method)
    if largest > method.max_factor_dim:
        return Reason.TOO_LARGE, f"a factor of {largest}^2 exceeds max_factor_dim={method.max_factor_dim}"
    return None


def _skips(capture: Capture, match: LayerMatch, reason: Reason, detail: str) -> list[Skip]:
    names = [name for name in (match.weight, match.bias) if name is not None]
    numel = {name: capture.parameter(name).numel for name in names}
    return [
        Skip(parameter=n, reason=reason, detail=detail, numel=numel[n], source=match.source) for n in names
    ]


def _model_nodes(capture: Capture) -> set[Node]:
    """Forward and training backward: what the loss and the training gradients are computed from."""
    return _sources([capture.loss, *capture.gradients.values()])


def _fisher_nodes(plan: Plan) -> set[Node]:
    """What the statistics need of the backward passes behind the training backward."""
    if len(plan.capture.passes) == 1:
        return set()
    read = [
        g for match in plan.matched if _reads_gradients(plan, match) for use in match.uses for g in use.g[1:]
    ]
    return _sources(read) - _model_nodes(plan.capture)


def _reads_gradients(plan: Plan, match: LayerMatch) -> bool:
    """Whether a layer's statistics need gradients: not those of its input alone, if all rows count."""
    of_input = all(name.startswith("A") for name in plan.method.statistics_names(match)) and not match.tied
    return not of_input or plan.capture.loss_info.ignores


def _sources(ends: Iterable[Node]) -> set[Node]:
    """The nodes and all that they are computed from."""
    found, queue = set(ends), list(ends)
    while queue:
        for node in queue.pop().all_input_nodes:
            if node not in found:
                found.add(node)
                queue.append(node)
    return found


def _flops(nodes: Collection[Node]) -> int:
    """Floating point operations of the nodes, of a convolution's backward for what is read among them."""
    known: dict[object, int] = {}
    total = 0
    for node in nodes:
        if getattr(node.target, "overloadpacket", None) not in flop_registry:
            continue
        read = frozenset[object]()
        if is_op(node, aten.convolution_backward.default):
            read = frozenset(user.args[1] for user in node.users if user in nodes)
        like = [str(value(arg).shape) if isinstance(arg, Node) else repr(arg) for arg in node.args]
        key = node.target, tuple(like), repr(node.kwargs), read
        if key not in known:
            known[key] = _flops_of(node, read)
        total += known[key]
    return total


def _flops_of(node: Node, read: Collection[object]) -> int:
    """By torch's own counter, which takes what groups have for the whole in the gradient of a convolution's
    weight: each gradient that is read has the forward's.
    """
    packet, times, result = node.target.overloadpacket, 1, node.meta.get("val")  # type: ignore[union-attr]
    args: tuple[Any, ...]
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])  # type: ignore[assignment]
    if packet is aten.convolution_backward:
        times = sum(place in read and bool(args[-1][place]) for place in (0, 1))
        packet, result, args = aten.convolution, args[0], (*args[1:3], None, *args[4:-1])
    return times * int(flop_registry[packet](*args, **kwargs, out_val=result))


def check_strict(plan: Plan) -> None:
    """Raise `UnsupportedModelError` once, with every trainable parameter that is skipped."""
    bad = [s for s in plan.skipped if s.reason is not Reason.FROZEN]
    if not bad:
        return
    width = max(len(s.parameter) for s in bad)
    total = sum(p.trainable for p in plan.capture.parameters)
    lines = [f"{len(bad)} of {total} parameters cannot be preconditioned (strict=True)."]
    for s in bad:
        lines.append(f"  {s.parameter:<{width}}  {s.reason.value}  {s.detail}  {s.source or ''}")
        lines.append(f"  {'':<{width}}  {s.advice}, or pass exclude=[{s.parameter!r}] with strict=False")
    raise UnsupportedModelError("\n".join(lines))
