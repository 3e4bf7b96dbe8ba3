"""The batch of an exported training step: which tensor of it is which input of the programs, and random ones.

Enters: the example batch of a target. Leaves: lines of Python. What the batch holds is not in them, its
structure, shapes and ranges are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from kfac_fx.batch import flatten_batch
from kfac_fx.errors import ExportError
from kfac_fx.export.layer_sections import quoted
from kfac_fx.export.settings_text import literal
from kfac_fx.planned import Plan
from kfac_fx.wording import with_article

_PLAIN = (bool, int, float, str, type(None))
_IDENTITY = "inputs and targets may be tensors, tuples, lists, dicts and plain numbers or strings"


def batch_text(plan: Plan, inputs: Any, targets: Any) -> str:
    """`EXPECTED`, `tensors_of` and `random_batch` of an exported file.

    Raises `ExportError` for a batch of another structure.
    """
    leaves = [*_leaves(inputs, "inputs"), *_leaves(targets, "targets")]
    found = [(place, leaf) for place, leaf in leaves if isinstance(leaf, Tensor)]
    capture = plan.capture
    names = [str(node.target) for node in (*capture.inputs, *capture.targets)]
    order = flatten_batch(inputs, targets).tensors
    if [id(leaf) for _, leaf in found] != [id(tensor) for tensor in order]:
        raise ExportError(f"the batch cannot be written as Python: {_IDENTITY}.")
    expected = [
        f"    {quoted(name)}: ({quoted(place)}, {_shape(tensor)}, {tensor.dtype}),"
        for name, (place, tensor) in zip(names, found, strict=True)
    ]
    read = [f"        {quoted(name)}: {place}," for name, (place, _) in zip(names, found, strict=True)]
    constants = [(place, leaf) for place, leaf in leaves if not isinstance(leaf, Tensor | type(None))]
    lines = [
        "EXPECTED = {  # name in the programs: (place, shape, dtype)",
        *expected,
        "}",
        "",
        "",
        "def tensors_of(inputs: Any, targets: Any) -> dict[str, Tensor]:",
        '    """The tensors of a batch by their names in the programs."""',
        *(line for place, value in constants for line in _constant(place, value)),
        "    return {",
        *read,
        "    }",
        "",
        "",
        "def random_batch() -> tuple[Any, Any]:",
        '    """Random inputs and targets of the shapes and ranges of the exported ones."""',
        f"    inputs = {_random(inputs)}",
        f"    targets = {_random(targets)}",
        "    return inputs, targets",
    ]
    return "\n".join(lines)


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """(expression, leaf) in the order in which the programs take them."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{place}[{literal(key)}]")
    elif type(value) in (tuple, list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{place}[{index}]")
    elif isinstance(value, (Tensor, *_PLAIN)):
        yield place, value
    else:
        raise ExportError(f"{place} is {with_article(type(value).__name__)}: {_IDENTITY}.")


def _constant(place: str, value: Any) -> Iterator[str]:
    """The batch has to hold this value; only nan differs from itself."""
    yield f"    if {place} == {place}:" if value != value else f"    if {place} != {literal(value)}:"
    message = f"this file was made with {place} = {value!r}"
    yield f"        raise ValueError({message!r})"


def _shape(tensor: Tensor) -> str:
    return repr(tuple(tensor.shape))


def _random(value: Any) -> str:
    """An expression for a random value like this one."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(key)}: {_random(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + "".join(f"{_random(item)}, " for item in value).strip() + ")"
    if isinstance(value, list):
        return "[" + ", ".join(map(_random, value)) + "]"
    return _random_tensor(value) if isinstance(value, Tensor) else literal(value)


def _random_tensor(tensor: Tensor) -> str:
    """Whole numbers between the least and the largest; rates where all lie in [0, 1]; else normal numbers."""
    shape, device = list(tensor.shape), "device=DEVICE"
    if tensor.numel() == 0:
        return f"torch.zeros({shape}, dtype={tensor.dtype}, {device})"
    if tensor.is_complex():
        return f"torch.randn({shape}, dtype={tensor.dtype}, {device})"
    wide = tensor.detach().double()
    least, largest = float(wide.min()), float(wide.max())
    whole = not tensor.is_floating_point()
    flags = least >= 0 and largest <= 1
    if whole or (flags and bool((wide == wide.round()).all())):
        low, high = int(least), int(largest) + 1
        return f"torch.randint({low}, {high}, {shape}, {device}).to({tensor.dtype})"
    maker = "rand" if flags else "randn"
    return f"torch.{maker}({shape}, {device}).to({tensor.dtype})"
