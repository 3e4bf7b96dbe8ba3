"""`Matches` + method -> frozen `Plan`.

Which factors are kept, what they cost, what is left to the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.fx.node import map_arg
from torch.utils.flop_counter import flop_registry

from kfac_fx.canonical import state_dtype
from kfac_fx.contracts import Method, Plan
from kfac_fx.errors import Reason, UnsupportedModelError
from kfac_fx.types import Capture, Fisher, LayerMatch, Matches, Sharing, Skip


def make_plan(
    capture: Capture,
    matches: Matches,
    method: Method,
    *,
    fisher: Fisher,
    sharing: Sharing,
    render: Callable[[Plan], str],
) -> Plan:
    """Decide for every match; layers whose factors exceed the method's limit become skips."""
    kept, large = [], []
    for match in matches.matched:
        (large if _largest(match) > method.max_factor_dim else kept).append(match)
    matches = Matches(matched=_reown(kept), skipped=(*matches.skipped, *_too_large(capture, large, method)))
    plan = Plan(
        capture=capture,
        matches=matches,
        method=method,
        factors=(),
        fisher=fisher,
        sharing=sharing,
        model_flops=_model_flops(capture),
        render=render,
    )
    specs = [spec for m in matches.matched for spec in method.factors(m, dtype=state_dtype(plan, m))]
    return replace(plan, factors=tuple(specs))


def _largest(match: LayerMatch) -> int:
    if match.structure == "block":
        return 1
    return match.d_out if match.structure == "diagonal" else max(match.d_in, match.d_out)


def _reown(kept: list[LayerMatch]) -> tuple[LayerMatch, ...]:
    """If the owner of a shared A was too large, the next reader owns it."""
    owners: dict[str, str] = {}
    return tuple(replace(m, shared_a=owners.setdefault(m.shared_a, m.key)) for m in kept)


def _too_large(capture: Capture, large: list[LayerMatch], method: Method) -> list[Skip]:
    skips, seen = [], set()
    for match in large:
        for name in (match.weight, match.bias):
            if name is None or name in seen:
                continue
            seen.add(name)
            detail = f"a factor of {_largest(match)}^2 exceeds max_factor_dim={method.max_factor_dim}"
            numel = capture.parameter(name).numel
            skips.append(
                Skip(parameter=name, reason=Reason.TOO_LARGE, detail=detail, numel=numel, source=match.source)
            )
    return skips


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
