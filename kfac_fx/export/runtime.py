"""The training step of an exported file: what does not depend on the model.

The text of its functions is copied into `train_step.py`, below the names that are only declared here. It may
use torch, the standard library and what `bundle` can copy with it; nothing runs it from here.
"""

# ruff: noqa: F821 - the rest of an exported file defines what is only declared here

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kfac_fx.contracts import Method
from kfac_fx.host import reading
from kfac_fx.precision import full_float32


class Layer(Protocol):
    """One layer: its state tensors by name, which of them another layer owns, its gradient as a matrix."""

    key: str
    weight: str
    names: tuple[str, ...]
    owners: dict[str, str]

    @staticmethod
    def initial_state() -> dict[str, Tensor]:
        """The tensors that this layer owns, before any statistics."""
        ...

    @staticmethod
    def to_matrix(gradients: Mapping[str, Tensor]) -> Tensor:
        """The gradients of weight and bias as one matrix per group."""
        ...

    @staticmethod
    def to_parameters(direction: Tensor) -> dict[str, Tensor]:
        """Such a matrix as gradients of weight and bias."""
        ...


Curvature = dict[str, dict[str, Tensor]]  # state tensors by owner and name

# What the rest of an exported file defines.
METHOD: Method
DEVICE: torch.device
FROZEN: tuple[str, ...]
CHANGED_BUFFERS: tuple[str, ...]
EXPECTED: dict[str, tuple[str, tuple[int, ...], torch.dtype]]
LAYERS: tuple[type[Layer], ...]
make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
tensors_of: Callable[[Any, Any], dict[str, Tensor]]
random_batch: Callable[[], tuple[Any, Any]]
to_all_parameters: Callable[[Mapping[str, Tensor], Sequence[Tensor]], dict[str, Tensor]]
loss_and_gradients: Callable[..., tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]]
loss_gradients_and_statistics: Callable[..., tuple[Tensor, Tensor, Tensor, dict[str, Tensor], Curvature]]


def initial_state() -> dict[str, Any]:
    """Parameters and buffers as they were exported, no curvature yet, a new optimizer.

    step: updates so far. parameters, buffers: by their names in the model. constants: tensors that the
    programs read. curvature: by layer and name. counts: how often statistics and inverses were renewed.
    troubled: whether the last refresh could not invert a factor at once.
    """
    saved = torch.load(Path(__file__).with_name("train_step.pt"), weights_only=True)
    parameters = {
        name: nn.Parameter(tensor, requires_grad=name not in FROZEN)
        for name, tensor in saved["parameters"].items()
    }
    trainable = [parameter for parameter in parameters.values() if parameter.requires_grad]
    return {
        "step": 0,
        "parameters": parameters,
        "buffers": saved["buffers"],
        "constants": saved["constants"],
        "curvature": {layer.key: layer.initial_state() for layer in LAYERS},
        "counts": {"statistics": 0, "refreshes": 0},
        "troubled": False,
        "optimizer": make_optimizer(trainable),
    }


def step(state: dict[str, Any], inputs: Any, targets: Any = None) -> Tensor:
    """One training step, which changes `state`. Returns the loss before the update: detached, 0-dim.

    Statistics are renewed every METHOD.statistics_every steps, inverses every METHOD.inverse_every. Raises
    ValueError if the batch is not of the shapes of this file, FloatingPointError if the loss or a gradient is
    not finite; nothing is changed then.
    """
    batch = tensors_of(inputs, targets)
    check_batch(batch)
    done = state["step"]
    collects = done % METHOD.statistics_every == 0
    inverts = METHOD.inverse_every > 0 and done % METHOD.inverse_every == 0
    new = dict(state, counts=dict(state["counts"]))  # tensors of the curvature are replaced, never written to
    with torch.no_grad(), torch.autocast(DEVICE.type, enabled=False), undone_on_error(state):
        loss, inverse_scale, check, gradients, statistics = run_program(state, batch, collects=collects)
        if not bool(torch.isfinite(torch.stack([loss.to(check.dtype), check])).all()):
            raise FloatingPointError(f"the loss is {float(loss)}, the sum of all gradients {float(check)}")
        if collects:
            fold(new, statistics, inverse_scale)
        if inverts:
            refresh(new)
        apply(new, gradients | preconditioned(new, gradients, dtype=inverse_scale.dtype))
    state.update(new, step=done + 1)
    return loss


def check_batch(batch: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a tensor that is not like the one that was captured: the shapes are fixed."""
    for name, tensor in batch.items():
        place, shape, dtype = EXPECTED[name]
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{place} is a {type(tensor).__name__}, not a tensor of {list(shape)} {dtype}")
        if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            found = f"{list(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"{place} is {found}, but this file is for {list(shape)} {dtype}")


@contextmanager
def undone_on_error(state: Mapping[str, Any]) -> Iterator[None]:
    """If anything fails inside, buffers that the model changes get their old values back."""
    buffers = [state["buffers"][name] for name in CHANGED_BUFFERS]
    old = [buffer.clone() for buffer in buffers]
    try:
        yield
    except BaseException:
        for buffer, value in zip(buffers, old, strict=True):
            buffer.copy_(value)
        raise


def run_program(
    state: Mapping[str, Any], batch: Mapping[str, Tensor], *, collects: bool
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor], Curvature]:
    """Loss, 1 / (its number of terms), a number that is finite if all gradients are, gradients, statistics.

    The statistics are those of this batch, by layer and name; none unless `collects`.
    """
    arguments = (state["parameters"], state["buffers"], state["constants"], batch, state["curvature"])
    if collects:
        return loss_gradients_and_statistics(*arguments)
    return (*loss_and_gradients(*arguments), {})


def layer_state(layer: type[Layer], curvature: Curvature) -> dict[str, Tensor]:
    """All tensors that a layer reads; those that depend on its input alone may belong to another layer."""
    return {name: curvature[layer.owners.get(name, layer.key)][name] for name in layer.names}


def fold(state: dict[str, Any], statistics: Curvature, inverse_scale: Tensor) -> None:
    """Put the statistics of a batch into the state of each layer."""
    counts, curvature = state["counts"], dict(state["curvature"])
    share = torch.tensor(METHOD.new_weight(counts["statistics"]), dtype=inverse_scale.dtype, device=DEVICE)
    for layer in LAYERS:
        old, batch = layer_state(layer, curvature), statistics.get(layer.key, {})
        with full_float32(DEVICE):
            changed = METHOD.fold(old, batch, weight=share, inverse_scale=inverse_scale)
        curvature[layer.key] = curvature[layer.key] | changed
    state["curvature"] = curvature
    counts["statistics"] += 1


def refresh(state: dict[str, Any]) -> None:
    """New inverses of all layers from the statistics so far."""
    counts, curvature = state["counts"], dict(state["curvature"])
    states = {layer.key: layer_state(layer, curvature) for layer in LAYERS}
    earlier: dict[str, int] = {layer.key: counts["refreshes"] for layer in LAYERS}
    with reading(counts["refreshes"] == 0 or state["troubled"]), full_float32(DEVICE):
        new, outcome = METHOD.refresh(states, counts=earlier)
    for layer in LAYERS:
        for name, tensor in new.get(layer.key, {}).items():
            owner = layer.owners.get(name, layer.key)
            curvature[owner] = curvature[owner] | {name: tensor}
    state["curvature"] = curvature
    state["troubled"] = bool(outcome.retried + outcome.kept_last)
    counts["refreshes"] += 1


def preconditioned(
    state: Mapping[str, Any], gradients: Mapping[str, Tensor], *, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The gradients of all layers, preconditioned, by the names of their parameters."""
    if not LAYERS:
        return {}
    matrices = [layer.to_matrix(gradients) for layer in LAYERS]
    rates = torch.tensor(learning_rates(state), dtype=dtype, device=DEVICE)
    with full_float32(DEVICE):
        directions = [
            METHOD.precondition(layer_state(layer, state["curvature"]), matrix)
            for layer, matrix in zip(LAYERS, matrices, strict=True)
        ]
        directions = METHOD.rescale(directions, matrices, learning_rates=rates)
    return to_all_parameters(gradients, directions)


def learning_rates(state: Mapping[str, Any]) -> list[float]:
    """That of each layer's weight, from the groups of the optimizer."""
    groups = state["optimizer"].param_groups
    rate_of = {id(parameter): float(group["lr"]) for group in groups for parameter in group["params"]}
    return [rate_of[id(state["parameters"][layer.weight])] for layer in LAYERS]


def apply(state: Mapping[str, Any], gradients: Mapping[str, Tensor]) -> None:
    """One step of the optimizer with these gradients; none is left behind."""
    for name, parameter in state["parameters"].items():
        parameter.grad = gradients.get(name)
    try:
        state["optimizer"].step()
    finally:
        for parameter in state["parameters"].values():
            parameter.grad = None


def in_full_float32(operator: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    """What the operator computes, with products of float32 not in TF32."""
    with full_float32(DEVICE):
        return operator(*arguments, **options)


def convolution_weight(*arguments: Any) -> Tensor:
    """The gradient of a convolution's weight alone."""
    return torch.ops.aten.convolution_backward(*arguments, [False, True, False])[1]


def main() -> None:
    """A few steps on random data."""
    torch.manual_seed(0)
    state = initial_state()
    inputs, targets = random_batch()
    for number in range(1, 6):
        print(f"step {number}: loss {float(step(state, inputs, targets)):.6f}")
