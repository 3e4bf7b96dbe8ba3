"""What eager PyTorch computes for the user's model: loss, gradients, buffers, and what each module read.

Enters: a `Subject`. Leaves: records of tensors. No graph of this library is involved.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from kfac_fx.loss import LossCall, LossRecorder
from kfac_fx.verification.twin import Subject, seeded

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
KNOWN = (
    nn.Linear,
    nn.Embedding,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    *CONVOLUTIONS,
    *TRANSPOSED,
    *BATCH_NORMS,
)


@final
@dataclass(frozen=True, kw_only=True)
class Plain:
    """One training step without any observer: what the captured programs have to reproduce."""

    loss: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


@final
@dataclass(kw_only=True)
class Call:
    """One call of a module. x: its input, a copy. output: attached to autograd. g: one per backward pass."""

    module: nn.Module
    x: Tensor
    output: Tensor
    g: list[Tensor] = field(default_factory=list)


@final
@dataclass(frozen=True, kw_only=True)
class Observed:
    """A second run with an observer at every module whose operator is known.

    calls: by parameter name of the module's weight, or its bias if it has no weight. losses: calls of torch's
    loss functions. loss: attached to autograd.
    """

    model: nn.Module
    calls: dict[str, list[Call]]
    losses: list[LossCall]
    loss: Tensor


def plain_step(subject: Subject) -> Plain:
    """Forward and backward as the user would run them."""
    model = subject.fresh()
    with seeded(model):
        loss = subject.loss(model)
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    return Plain(loss=loss.detach(), gradients=gradients, buffers=buffers)


def observed_step(subject: Subject) -> Observed:
    """Forward once; the calls have the `g` of the loss' own backward pass."""
    model = subject.fresh()
    names = {id(p): name for name, p in model.named_parameters()}
    calls: dict[str, list[Call]] = {}
    recording = [True]

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        read = args[0] if args else kwargs.get("input")
        name = names.get(id(module._parameters.get("weight")))
        if not isinstance(output, Tensor) or not isinstance(read, Tensor) or name is None:
            return None
        if recording[0]:
            calls.setdefault(name, []).append(Call(module=module, x=read.detach().clone(), output=output))
        return output.clone()  # what follows may change it in place

    for module in model.modules():
        if type(module) in KNOWN:
            module.register_forward_hook(hook, with_kwargs=True)
    with seeded(model), LossRecorder() as recorder:
        loss = subject.loss(model)
        recording[0] = False  # checkpointing calls modules again
        observed = Observed(model=model, calls=calls, losses=recorder.calls, loss=loss)
        add_pass(observed, loss, None)
    return observed


def add_pass(observed: Observed, start: Tensor, seed: Tensor | None) -> None:
    """Run one more backward pass from `start`; every call gets its `g`."""
    flat = [call for calls in observed.calls.values() for call in calls if call.output.requires_grad]
    if not flat:
        return
    found = torch.autograd.grad(
        start, [call.output for call in flat], seed, retain_graph=True, materialize_grads=True
    )
    for call, g in zip(flat, found, strict=True):
        call.g.append(g)
