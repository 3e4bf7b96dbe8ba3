"""The update of one training step: directions rescaled, then the base optimizer of PyTorch.

Enters: the directions of each layer, which are checked apart. Leaves: a check per layer, and one of the
parameters that keep their plain gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import EllipsisType

import torch
from torch import Tensor

from kfac_fx.methods import KFAC, NKFAC
from kfac_fx.methods.base import KroneckerFactored
from kfac_fx.types import LayerMatch
from kfac_fx.verification.eager import Plain
from kfac_fx.verification.layers import canonical_gradient
from kfac_fx.verification.ours import Ours
from kfac_fx.verification.records import Check
from kfac_fx.verification.tolerance import Tolerance, joined
from kfac_fx.verification.twin import Subject


def update_checks(
    subject: Subject, plain: Plain, ours: Ours, *, tolerance: Tolerance
) -> tuple[dict[str, Check], Check]:
    """(by key of the layer, of the parameters without a layer)."""
    names = {name for match in ours.plan.matched for name in (match.weight, match.bias) if name}
    rest = [name for name, _ in subject.model.named_parameters() if name not in names]
    expected = _expected(subject, plain, ours)
    if isinstance(expected, str):
        missing = Check(name="update", reason=expected)
        return {match.key: missing for match in ours.plan.matched}, missing
    before, after = (dict(model.named_parameters()) for model in (subject.model, ours.stepped))

    def check(name: str, part: slice | EllipsisType) -> Check:
        wanted, old, found = expected[name][part], before[name][part], after[name][part]
        return Check(name=name, error=_error(found, wanted, old), tolerance=tolerance.solve * 1e-2, detail="")

    by_layer = {}
    for match in ours.plan.matched:
        part = ... if match.part is None else slice(*match.part)
        own = [check(name, part) for name in (match.weight, match.bias) if name]
        by_layer[match.key] = joined("update", own)
    others = [check(name, ...) for name in rest]
    return by_layer, joined("update of other parameters", others) if others else Check(
        name="update of other parameters",
        error=0.0,
        nothing=True,
        detail="every parameter belongs to a layer",
    )


def _error(found: Tensor, wanted: Tensor, old: Tensor) -> float:
    """Largest difference, less the rounding of the parameter itself, relative to the largest change.

    Rounding is that of the parameter's own dtype, value by value: the last sum of a step is off by half an
    eps of its result, on either side.
    """
    if not wanted.numel():
        return 0.0
    eps = torch.finfo(old.dtype).eps
    found, wanted, old = (t.detach().double() for t in (found, wanted, old))
    rounding = 2 * eps * torch.maximum(old.abs(), wanted.abs())
    change = float((wanted - old).abs().max())
    excess = float(((found - wanted).abs() - rounding).max())
    if math.isnan(excess):
        return math.nan
    return 0.0 if excess <= 0 else excess / change if change > 0 else excess


def _expected(subject: Subject, plain: Plain, ours: Ours) -> dict[str, Tensor] | str:
    """Parameters after the base optimizer's step with the rescaled directions; or why they are not known."""
    method, matches = ours.plan.method, ours.plan.matched
    if not isinstance(method, KroneckerFactored):
        return f"no independent formula for the update of {method.name}"
    if isinstance(method, KFAC) and method.quadratic_model:
        return "the quadratic model's update has no independent formula here"
    gradients = [canonical_gradient(match, plain.gradients).double() for match in matches]
    directions = [ours.directions[match.key].double() for match in matches]
    directions = rescaled(method, directions, gradients, ours.rate)
    model = subject.fresh()
    named = dict(model.named_parameters())
    for name, gradient in plain.gradients.items():
        named[name].grad = gradient.clone()
    for match, direction in zip(matches, directions, strict=True):
        _write(match, direction, {name: p.grad for name, p in named.items() if p.grad is not None})
    method.base_optimizer([p for p in model.parameters() if p.requires_grad]).step()
    return {name: p.detach() for name, p in named.items()}


def rescaled(
    method: KroneckerFactored, directions: Sequence[Tensor], gradients: Sequence[Tensor], rate: float
) -> list[Tensor]:
    """Directions of all layers with the lengths of 1.8: of each gradient (C2), or within the KL clip (C1)."""
    if isinstance(method, NKFAC):
        pairs = zip(directions, gradients, strict=True)
        return [v * (g.norm() / (v.norm() + 1e-12)) for v, g in pairs]
    if method.kl_clip is not None:
        return _clipped(directions, gradients, rate, method.kl_clip)
    return list(directions)


def _clipped(
    directions: Sequence[Tensor], gradients: Sequence[Tensor], rate: float, bound: float
) -> list[Tensor]:
    """One factor nu = min(1, sqrt(bound / |sum lr^2 <V, grad>|)) for all layers (methods.md 1.8 C1)."""
    products = [float((v * g).sum()) for v, g in zip(directions, gradients, strict=True)]
    total = abs(rate**2 * sum(products))
    nu = 1.0 if total == 0 else min(1.0, math.sqrt(bound / total))
    return [v * nu for v in directions]


def _write(match: LayerMatch, direction: Tensor, gradients: dict[str, Tensor]) -> None:
    """Put a canonical direction into the places of the gradients."""
    part = ... if match.part is None else slice(*match.part)
    columns = direction.unbind(-1) if match.structure == "block" else None
    weight = columns[0] if columns else direction if match.bias is None else direction[..., :-1]
    gradients[match.weight][part] = match.layout.to_parameter(weight).to(gradients[match.weight].dtype)
    if match.bias is not None:
        assert match.bias_layout is not None
        bias = match.bias_layout.to_parameter(direction[..., -1])
        gradients[match.bias][part] = bias.to(gradients[match.bias].dtype)
