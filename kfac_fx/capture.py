"""Model + loss + example batch -> `Capture`: forward, loss and backward as one graph with names.

Whole-graph tracing with fake tensors: nothing of the model is run on real data and nothing of it is changed.
The backward passes of the Fisher follow the training backward in the same graph.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from kfac_fx import graph as fxgraph
from kfac_fx.batch import Batch, call_model, default_loss
from kfac_fx.errors import CaptureError, KfacFxError
from kfac_fx.loss import LossRecorder
from kfac_fx.passes import Trace, backward_passes, check_loss
from kfac_fx.record import make_capture
from kfac_fx.sources import OWN_ROOT, TORCH_ROOT, user_frames
from kfac_fx.traced import Capture
from kfac_fx.types import Fisher, LossFn
from kfac_fx.untouched import attributes_restored


def capture(
    model: nn.Module,
    loss_fn: LossFn | None,
    batch: Batch,
    *,
    fisher: Fisher = "empirical",
) -> Capture:
    """Trace one training step of `model` on a batch of these shapes.

    The model's mode (train or eval), the active autocast state and each parameter's requires_grad are part of
    what is captured. Raises `CaptureError` with the user's line if the model cannot be written as one graph,
    `LossError` if the loss is not a differentiable scalar or does not fit `fisher`.
    """
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    trace = Trace()
    joint = _joint_function(model, loss_fn, batch, parameters, buffers, fisher, trace)
    flat = _distinct([*parameters.values(), *buffers.values(), *batch.tensors])
    with fxgraph.TRACING, _tracing_context(model), attributes_restored(model), _without_torchs_log():
        try:
            module = make_fx(joint, tracing_mode="fake", _allow_non_fake_inputs=True)(*flat)
        except KfacFxError:
            raise
        except Exception as error:
            raise _explain(error, model, batch) from error
    return make_capture(module, model, loss_fn, batch, parameters, buffers, fisher, trace)


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    """The same tensors as different objects: one object given twice would become one placeholder."""
    seen: set[int] = set()
    flat = []
    for tensor in tensors:
        flat.append(tensor.detach() if id(tensor) in seen else tensor)
        seen.add(id(tensor))
    return flat


def _joint_function(
    model: nn.Module,
    loss_fn: LossFn | None,
    batch: Batch,
    parameters: dict[str, nn.Parameter],
    buffers: dict[str, Tensor],
    fisher: Fisher,
    trace: Trace,
) -> Callable[..., tuple[Tensor, ...]]:
    names, buffer_names = list(parameters), list(buffers)
    num_fixed = len(names) + len(buffer_names)

    def joint(*flat: Tensor) -> tuple[Tensor, ...]:
        _note_sources()
        trained = {
            name: tensor.detach().requires_grad_(parameters[name].requires_grad)
            for name, tensor in zip(names, flat, strict=False)
        }
        state = {**trained, **dict(zip(buffer_names, flat[len(names) : num_fixed], strict=True))}
        inputs, targets = batch.rebuild(flat[num_fixed:])

        def run() -> tuple[Tensor, ...]:
            with torch.enable_grad(), LossRecorder() as recorder:
                outputs = call_model(model, inputs)
                loss = (loss_fn or default_loss)(outputs, targets)
            check_loss(loss)
            replaced = _replaced_buffers(model, slots)
            leaves = {name: tensor for name, tensor in trained.items() if tensor.requires_grad}
            with _no_autocast():
                results = backward_passes(loss, leaves, recorder.calls, fisher, batch, trace)
            with torch.no_grad():
                for old, new in replaced:
                    old.copy_(new)
            return results

        by_id = {id(t): state[name] for name, t in (*parameters.items(), *buffers.items())}
        slots = {path: by_id[id(t)] for path, t in _slots(model)}
        # The backward must run inside too: activation checkpointing calls the model again from there.
        return torch.func.functional_call(_Step(model, run), slots, (), tie_weights=False)

    return joint


def _note_sources() -> None:
    """Write the user's lines into the nodes of the running trace."""
    mode = get_proxy_mode()
    assert mode is not None, "no trace is running"
    create = mode.tracer.create_node

    def create_node(*args: Any, **kwargs: Any) -> Node:
        node = create(*args, **kwargs)
        if frames := user_frames():
            node.stack_trace = frames
        return node

    mode.tracer.create_node = create_node  # type: ignore[method-assign]


def _slots(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every place that holds a parameter or buffer, once; a module that has two names is one place."""
    for path, module in model.named_modules(prefix="model"):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}", tensor


def _replaced_buffers(model: nn.Module, slots: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(old, new) of buffers that forward assigned anew instead of changing them in place."""
    return [(slots[path], now) for path, now in _slots(model) if path in slots and now is not slots[path]]


@final
class _Step(nn.Module):
    """Runs a whole training step while its submodule's parameters are replaced."""

    def __init__(self, model: nn.Module, run: Callable[[], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self) -> tuple[Tensor, ...]:
        """The step's results."""
        return self.run()


@contextlib.contextmanager
def _tracing_context(model: nn.Module) -> Iterator[None]:
    """Decompose fused recurrent kernels (they hide the products); keep autocast from caching traced casts."""
    recurrent = any(isinstance(m, nn.RNNBase | nn.RNNCellBase) for m in model.modules())
    cached = torch.is_autocast_cache_enabled()
    with contextlib.ExitStack() as stack:
        if recurrent:
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)


@contextlib.contextmanager
def _without_torchs_log() -> Iterator[None]:
    """Keep torch from logging the traceback of an operator that cannot be traced: the error itself tells."""
    logger, thread = logging.getLogger("torch._subclasses.fake_tensor"), threading.get_ident()

    def other(record: logging.LogRecord) -> bool:
        return record.thread != thread or not record.getMessage().startswith("failed while attempting")

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    """Autograd runs each backward in the dtype of its forward; an active autocast would cast it again."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _explain(error: Exception, model: nn.Module, batch: Batch) -> CaptureError:
    """One message with the user's line and the remedy for whatever tracing raised."""
    where = _user_line(error)
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    kind = type(error).__name__
    if "DataDependent" in kind or "GuardOnDataDependent" in kind or "trying to get a value out" in str(error):
        problem = (
            "the value of a tensor decides what Python does next (an if, int(), .item() or a loop bound)"
        )
        remedy = "Use torch.where, a mask, or move the decision out of the model."
    elif "use_reentrant" in str(error) or "Checkpointing is not compatible" in str(error):
        problem = "reentrant activation checkpointing cannot be captured"
        remedy = "Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
    elif "grouped_mm" in f"{where} {error}":
        problem = f"torch cannot trace grouped_mm here ({first.rstrip('.')})"
        remedy = (
            "Compute the experts without it (transformers: model.set_experts_implementation('batched_mm'))."
        )
    else:
        problem = f"{kind}: {first.rstrip('.')}"
        remedy = _input_hint(model, batch)
    return CaptureError(
        f"{type(model).__name__} cannot be captured as one graph, {where}: {problem}. {remedy}"
    )


def _user_line(error: Exception) -> str:
    own = [f for f in traceback.extract_tb(error.__traceback__) if not _is_library(f.filename)]
    return f"at {own[-1].filename}:{own[-1].lineno} ({own[-1].line})" if own else "inside a module of torch"


def _is_library(filename: str) -> bool:
    return filename.startswith((TORCH_ROOT, OWN_ROOT)) or filename.startswith("<")


def _input_hint(model: nn.Module, batch: Batch) -> str:
    """What to check; the dtypes of parameters and inputs where they differ."""
    hint = "Check that model(inputs) and loss_fn(outputs, targets) run."
    parameter = next(iter(model.parameters()), None)
    dtypes = {tensor.dtype for tensor in batch.tensors[: batch.num_inputs]}
    if parameter is None or dtypes <= {parameter.dtype}:
        return hint
    listed = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    own = str(parameter.dtype).removeprefix("torch.")
    return f"{hint} The model's parameters are {own}; the inputs are {listed}."
