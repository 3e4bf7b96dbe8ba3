"""Checks between the user's objects and a step: one clear error each, before anything is changed."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.parameter import is_lazy

from kfac_fx.batch import Batch
from kfac_fx.contents import Contents
from kfac_fx.errors import (
    InputError,
    KfacFxError,
    ModelChangedError,
    OptimizerMismatchError,
    StateError,
    UnknownNameError,
    did_you_mean,
)
from kfac_fx.planned import Plan

Fingerprint = dict[str, tuple[int, tuple[int, ...], torch.dtype, torch.device]]


# Words of the operators' own messages about dtypes and indices.
_BATCH_WORDS = (
    "dtype",
    "scalar type",
    "same type",
    "xpected",
    "out of range",
    "out of bounds",
    "Long",
    "Int",
)


def model_device(model: nn.Module) -> torch.device:
    """Device of the first parameter. Raises `InputError` if the model has none."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise InputError(f"{type(model).__name__} has no parameters: there is nothing to train.")
    return parameter.device


def copied(model: nn.Module, who: str) -> nn.Module:
    """A copy without gradients, to be run or trained in the model's place.

    Raises `KfacFxError` with the remedy if it cannot be copied. who: what changes nothing of the user's.
    """
    try:
        twin = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise KfacFxError(
            f"{type(model).__name__} cannot be copied, and {who} changes nothing of yours: "
            f"copy.deepcopy(model) raises {type(error).__name__}: {error}. Pass a model that was built anew."
        ) from error
    for parameter in twin.parameters():
        parameter.grad = None
    return twin


def fingerprint(contents: Contents) -> Fingerprint:
    """What a compiled step relies on: identity, shape, dtype and device of every parameter."""
    return {name: (id(p), tuple(p.shape), p.dtype, p.device) for name, p in contents.parameters.items()}


def check_unchanged(contents: Contents, known: Fingerprint) -> None:
    """Raise `ModelChangedError` if parameters were added, removed, replaced, cast or moved after compile."""
    now = fingerprint(contents)
    if now == known:
        return
    changes = [f"{name} was added" for name in now if name not in known]
    changes += [f"{name} was removed" for name in known if name not in now]
    for name in now:
        if name in known and now[name] != known[name]:
            changes.append(_change(name, known[name], now[name]))
    listed = "; ".join(changes[:5]) + (f"; and {len(changes) - 5} more" if len(changes) > 5 else "")
    raise ModelChangedError(
        f"the model changed after compile: {listed}. Call kfac_fx.compile(model, ...) again."
    )


def _change(name: str, old: tuple[Any, ...], new: tuple[Any, ...]) -> str:
    words = ("replaced", "reshaped", "cast", "moved")
    for position in (1, 2, 3):
        if old[position] != new[position]:
            return f"{name} was {words[position]} from {old[position]} to {new[position]}"
    return f"{name} was replaced by another tensor"


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raise `OptimizerMismatchError` unless the optimizer holds exactly the model's trainable parameters."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise OptimizerMismatchError(
            "LBFGS calls a closure several times per step; a compiled step runs the model once. "
            "Use an optimizer whose step() needs no closure."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = {id(p): name for name, p in model.named_parameters()}
    foreign = len(held - set(named))
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if foreign:
        remedy = "Build it from model.parameters() of the compiled model, after moving or casting it."
        raise OptimizerMismatchError(
            f"the optimizer holds {foreign} tensors that are not parameters of the model. {remedy}"
        )
    if missing:
        listed = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        remedy = "Add them to a parameter group, or freeze them with requires_grad_(False)."
        raise OptimizerMismatchError(
            f"the optimizer lacks {len(missing)} trainable parameters: {listed}. {remedy}"
        )


def check_batch(batch: Batch, model: nn.Module) -> None:
    """Raise `InputError` if a tensor of the batch is on another device than the model, or it is empty."""
    device = model_device(model)
    for index, tensor in enumerate(batch.tensors):
        what = f"input {index}" if index < batch.num_inputs else f"target {index - batch.num_inputs}"
        if index == 0 and tensor.dim() > 0 and tensor.shape[0] == 0:
            raise InputError(
                f"{what} has no examples: its shape is {tuple(tensor.shape)}. Skip empty batches."
            )
        if tensor.device != device and tensor.dim() > 0:
            raise InputError(
                f"{what} is on {tensor.device}, but the model is on {device}. "
                f"Move it with .to({str(device)!r})."
            )


def check_state(state: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise `StateError` if `state` was not saved by `state_dict` of a step of this model and optimizer."""
    missing = [key for key in ("step", "curvature", "counts", "optimizer") if key not in state]
    if missing:
        raise StateError(f"this is not a state of TrainStep.state_dict(): it lacks {', '.join(missing)}.")
    names = [name for name, _ in model.named_parameters()]
    foreign = sorted(key for key in state["curvature"] if key.split("[")[0] not in names)
    if foreign:
        raise StateError(
            f"the saved state belongs to another model: it has curvature for {', '.join(foreign[:5])}; "
            f"this model's parameters are {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}."
        )
    saved = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
    own = [len(group["params"]) for group in optimizer.param_groups]
    if saved != own:
        raise StateError(
            f"the saved optimizer has parameter groups of {saved} tensors, this one of {own}: "
            "build the optimizer as it was when the state was saved."
        )


def check_sized(model: nn.Module) -> None:
    """Raise `KfacFxError` if a lazy module has not run yet."""
    if lazy := [name for name, p in model.named_parameters() if is_lazy(p)]:
        raise KfacFxError(
            f"{type(model).__name__} has lazy parameters without a size ({', '.join(lazy[:5])}): run it once "
            "on a batch before it is compiled."
        )


def check_trainable(model: nn.Module) -> None:
    """Raise `KfacFxError` if there is nothing to train."""
    if next(model.parameters(), None) is None:
        raise KfacFxError(f"{type(model).__name__} has no parameters: there is nothing to train.")
    if not any(p.requires_grad for p in model.parameters()):
        raise KfacFxError(
            f"{type(model).__name__} has no trainable parameters: "
            "call requires_grad_(True) on those to train."
        )


def first_run(
    run: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor], plan: Plan
) -> tuple[Tensor, ...]:
    """Run a program for the first time: what fake tensors do not check (dtypes, index ranges) shows here.

    Raises `InputError` in place of the operator's own error.
    """
    try:
        return tuple(run(*tensors))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not any(word in first for word in _BATCH_WORDS):
            raise
        dtypes = [sorted({_dtype(n) for n in nodes}) for nodes in (plan.capture.inputs, plan.capture.targets)]
        own = sorted({str(p.dtype).removeprefix("torch.") for p in plan.capture.parameters})
        raise InputError(
            f"{plan.capture.model_name} cannot run on this batch: {first}. "
            f"Parameters are {', '.join(own)}, inputs {', '.join(dtypes[0]) or 'none'}, "
            f"targets {', '.join(dtypes[1]) or 'none'}: cast the batch "
            "with .to(dtype) to what the model and loss_fn expect, and check that indices are in range."
        ) from error


def _dtype(node: Node) -> str:
    return str(node.meta["val"].dtype).removeprefix("torch.")


def check_exclude(patterns: tuple[str, ...], model: nn.Module) -> None:
    """Raise `UnknownNameError` for a pattern that matches no parameter."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UnknownNameError(f"exclude={pattern!r} matches no parameter.{did_you_mean(pattern, names)}")


def capture_key(contents: Contents, batch: Batch) -> object:
    """Equal keys mean equal graphs.

    Shapes, dtypes, structure, mode, autocast state, requires_grad pattern, buffers.
    """
    autocast = tuple(
        (device, torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    )
    return (
        tuple((t.shape, t.dtype, t.device) for t in batch.tensors),
        tuple(repr(leaf) for leaf in batch.rest),
        str(batch.spec),
        contents.training,
        tuple(p.requires_grad for p in contents.parameters.values()),
        tuple((name, b.shape, b.dtype) for name, b in contents.buffers.items()),
        autocast,
    )
