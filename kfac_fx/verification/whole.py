"""Checks of the whole model: loss, gradients and buffers of the captured programs; the scale of the loss.

Enters: what eager PyTorch and this library computed. Leaves: `Check`s.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kfac_fx.loss import LossCall
from kfac_fx.planned import Plan
from kfac_fx.verification.eager import Observed, Plain
from kfac_fx.verification.ours import Outputs
from kfac_fx.verification.records import Check
from kfac_fx.verification.tolerance import compared, distance, wide
from kfac_fx.wording import counted

_MOST_COLUMNS = 256


def step_checks(plain: Plain, outputs: Outputs, plan: Plan, *, tolerance: float) -> tuple[Check, ...]:
    """Loss, gradients and buffers of the program against plain forward and backward."""
    loss = compared("loss", outputs.loss, plain.loss, tolerance=tolerance)
    gradients = _all("gradients", outputs.gradients, plain.gradients, plan, tolerance=tolerance)
    if not plain.buffers:
        return loss, gradients
    return loss, gradients, _all("buffers", outputs.buffers, plain.buffers, plan, tolerance=tolerance)


def _all(
    name: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], plan: Plan, *, tolerance: float
) -> Check:
    """The worst of named tensors. Entries that cancel to nothing are measured by the largest of all."""
    missing = sorted(found.keys() ^ expected.keys())
    if missing:
        return Check(
            name=name, error=float("inf"), tolerance=tolerance, detail=f"only one side has {missing[0]}"
        )
    if all(torch.equal(found[key], expected[key]) for key in expected):
        return Check(name=name, error=0.0, tolerance=tolerance, detail="bit-identical")
    sizes = {key: float(wide(tensor).abs().max()) for key, tensor in expected.items() if tensor.numel()}
    largest = max(sizes.values())
    errors = {
        key: distance(found[key], expected[key], size=max(size, 1e-4 * largest))
        for key, size in sizes.items()
    }
    worst = max(errors, key=lambda key: float("inf") if errors[key] != errors[key] else errors[key])
    source = plan.capture.user_sources.get(worst)
    where = f" ({source}: {source.code})" if source else ""
    return Check(name=name, error=errors[worst], tolerance=tolerance, detail=f"largest at {worst}{where}")


def scale_check(plan: Plan, observed: Observed, inverse_scale: Tensor, *, tolerance: float) -> Check:
    """R_ of methods.md 1.1 from the second derivative of the user's loss along one direction."""
    name = "scale of the loss (1/R_)"
    call = _single(plan, observed)
    if isinstance(call, str):
        return Check(name=name, reason=call)
    f = call.prediction
    v = torch.arange(1, f.numel() + 1, device=f.device, dtype=f.dtype).reshape(f.shape).cos()
    curvature = _hessian_product(observed.loss, f, v)
    terms = (v * curvature).sum(call.class_dim)
    unit = (v * _unit_product(call, v)).sum(call.class_dim)
    kept = terms != 0
    if not bool(kept.any()):
        return Check(name=name, reason="the loss is linear in the tensor that it reads")
    ratios = (terms / unit)[kept]
    if float(ratios.max() - ratios.min()) > 1e-3 * float(ratios.abs().max()):
        return Check(name=name, reason="terms of the loss weigh differently")
    expected = ratios.mean().reciprocal()
    detail = f"{call.kind}, {counted(int(kept.sum()), 'term')}"
    return compared(name, inverse_scale.reshape(()), expected.detach(), tolerance=tolerance, detail=detail)


def cotangent_check(
    plan: Plan, observed: Observed, seeds: list[Tensor], inverse_scale: Tensor, *, tolerance: float
) -> Check:
    """Type-2 Fisher: `1/R_ sum of s s^T` over the passes' seeds is the Hessian of the user's loss."""
    name = "Fisher"
    call = _single(plan, observed)
    if isinstance(call, str):
        return Check(name=name, reason=call)
    if plan.fisher == "mc":
        return Check(name=name, reason="labels are drawn: one draw says nothing of their mean")
    f = call.prediction
    columns = f[0].numel()
    if f.dim() < 2 or columns > _MOST_COLUMNS:
        return Check(
            name=name, reason=f"a prediction of shape {tuple(f.shape)} has no small Hessian per example"
        )
    found, expected = [], []
    for column in range(columns):
        e = torch.zeros_like(f).flatten(1)
        e[:, column] = 1.0
        expected.append(_hessian_product(observed.loss, f, e.reshape(f.shape)).flatten(1))
        rows = [seed.flatten(1) for seed in seeds]
        found.append(torch.stack([s * s[:, column : column + 1] for s in rows]).sum(0) * inverse_scale)
    if not any(bool(h.any()) for h in expected):
        return Check(name=name, reason="the loss is linear in the tensor that it reads")
    return compared(name, torch.stack(found), torch.stack(expected), tolerance=tolerance, detail="seeds")


def _single(plan: Plan, observed: Observed) -> LossCall | str:
    """The one call of a known loss, or why there is none."""
    if len(observed.losses) != 1 or len(plan.capture.losses) != 1:
        several = len(plan.capture.losses) > 1
        return ("the loss is a sum of several: " if several else "") + plan.capture.loss_info.note
    return observed.losses[0]


def _hessian_product(loss: Tensor, f: Tensor, v: Tensor) -> Tensor:
    """Second derivative of the loss with respect to the prediction, times v."""
    (slope,) = torch.autograd.grad(loss, [f], create_graph=True)
    if not slope.requires_grad:
        return torch.zeros_like(f)
    found = torch.autograd.grad(slope, [f], v, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(f) if found is None else found


def _unit_product(call: LossCall, v: Tensor) -> Tensor:
    """The same of one term `ell` of weight one (methods.md 1.2)."""
    f = call.prediction.detach()
    if call.kind == "mse":
        return v
    if call.kind == "bce":
        q = torch.sigmoid(f)
        return q * (1 - q) * v
    p = torch.softmax(f, call.class_dim)
    return p * (v - (p * v).sum(call.class_dim, keepdim=True))
