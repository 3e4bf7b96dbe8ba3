"""One capture for equal models, for test files that train the same small models by every method.

A capture knows nothing of the method, and most of the time of such tests would go into making it again. A
file asks for it by `pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")`. What cannot be
described for certain is captured anew.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from kfac_fx.batch import Batch
from kfac_fx.traced import Capture

PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size, torch.memory_format)
NAMED = (FunctionType, BuiltinFunctionType, type)  # equal only if they are the same object
OWN = ("_parameters", "_buffers", "_modules")


class NotDescribed(Exception):
    """An object that two models may hold differently without our seeing it."""


def described(value: Any) -> Hashable:
    """Equal for values that make no difference to a trace. Raises `NotDescribed`."""
    if type(value) in PLAIN or isinstance(value, NAMED):
        return type(value), value
    if type(value) in (tuple, list):
        return type(value), tuple(described(item) for item in value)
    if type(value) in (dict, OrderedDict):
        return type(value), tuple((described(key), described(item)) for key, item in value.items())
    if type(value) is set and not value:
        return type(value)
    raise NotDescribed


def tensor_of(tensor: Tensor) -> Hashable:
    """Everything but the values."""
    if type(tensor) not in (Tensor, nn.Parameter):
        raise NotDescribed
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def model_of(model: nn.Module) -> Hashable:
    """Modules with their attributes; parameters and buffers with the places that share them."""
    modules = tuple(
        (name, type(module), described({k: v for k, v in vars(module).items() if k not in OWN}))
        for name, module in model.named_modules(remove_duplicate=False)
    )
    tensors = {**dict(model.named_parameters(remove_duplicate=False))}
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    places = tuple((n, tensor_of(t), first.setdefault(id(t), n)) for n, t in tensors.items())
    return modules, places


def batch_of(batch: Batch) -> Hashable:
    """Sizes of the tensors, and where they stand."""
    constants = tuple("tensor" if repr(leaf) == "tensor" else described(leaf) for leaf in batch.rest)
    return tuple(map(tensor_of, batch.tensors)), batch.num_inputs, constants, repr(batch.spec)


def surroundings() -> Hashable:
    """Settings of torch that a trace depends on."""
    cpu = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        cpu,
        torch.are_deterministic_algorithms_enabled(),
    )


def remembering(capture: Callable[..., Capture]) -> Callable[..., Capture]:
    """`capture`, which gives equal models and batches the same record."""
    known: dict[Hashable, Capture] = {}

    def remembered(model: nn.Module, loss_fn: Any, batch: Batch, *, fisher: Any = "empirical") -> Capture:
        try:
            key = model_of(model), described(loss_fn), batch_of(batch), fisher, surroundings()
        except NotDescribed:
            return capture(model, loss_fn, batch, fisher=fisher)
        if key not in known:
            known[key] = capture(model, loss_fn, batch, fisher=fisher)
        return known[key]

    return remembered


def facts(captured: Capture) -> Iterator[Mapping[str, Any]]:
    """What a shared capture says, node by node, to see whether someone wrote into it."""
    for node in captured.graph.graph.nodes:
        meta = {key: str(value) for key, value in node.meta.items()}
        yield {"text": node.format_node() or node.name, "name": node.name, "meta": meta}
