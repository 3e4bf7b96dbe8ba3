"""`Matches` + method -> frozen `Plan`.

Which factors are kept, what they cost, what is left to the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch.fx.node import map_arg
from torch.utils.flop_counter import flop_registry

from kfac_fx.canonical import state_dtype
from kfac_fx.contracts import Method, Plan
from kfac_fx.errors import Reason, UnsupportedModelError
from kfac_fx.traced import Capture
from kfac_fx.types import Fisher, LayerMatch, Matches, Sharing, Skip


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
        model_flops=_model_flops(capture),
        render=render,
        without=without,
    )
    if plan.rounds_rows:
        _check_rounding(plan)
    specs = [spec for m in matches.matched for spec in method.factors(m, dtype=state_dtype(plan, m))]
    return replace(plan, factors=tuple(specs))


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


def _model_flops(capture: Capture) -> int:
    """Floating point operations of forward and training backward, by torch's own counter."""
    total = 0
    stop = max((n for n in capture.gradients.values()), key=_order(capture).__getitem__, default=None)
    for node in capture.graph.graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if node.op == "call_function" and packet in flop_registry:
            read = map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
            total += int(flop_registry[packet](*read[0], **read[1], out_val=node.meta["val"]))
        if node is stop:
            break
    return total


def _order(capture: Capture) -> dict[torch.fx.Node, int]:
    return {node: i for i, node in enumerate(capture.graph.graph.nodes)}


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
