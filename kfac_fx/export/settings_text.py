"""The settings of an exported training step: its method, its device, and its base optimizer.

Enters: a plan and its target. Leaves: lines of Python.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from kfac_fx.export.bundle import Bundle
from kfac_fx.export.layer_sections import quoted, tuple_text
from kfac_fx.lower import mutated_placeholders
from kfac_fx.planned import Plan
from kfac_fx.target import Target


def settings(plan: Plan, target: Target, copied: Bundle) -> Iterator[str]:
    """`METHOD`, `DEVICE`, names of parameters and buffers, and `make_optimizer`."""
    method: Any = plan.method
    values = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.name in copied.members}
    written = "".join(f"\n    {name}={literal(value)}," for name, value in values.items())
    frozen = tuple(p.name for p in plan.capture.parameters if not p.trainable)
    names = [*(p.name for p in plan.capture.parameters), *plan.capture.buffers]
    changed = tuple(names[i] for i in mutated_placeholders(plan.capture.graph))
    parameter = next(iter(target.model.parameters()))
    name = copied.names[type(method).__module__, type(method).__qualname__]
    yield "\n".join(
        [
            f"METHOD = {name}({written}\n)",
            f"DEVICE = torch.device({quoted(str(parameter.device))})",
            f"FROZEN = {_tuple(frozen)}  # parameters that are not trained",
            f"CHANGED_BUFFERS = {_tuple(changed)}  # by the model's forward",
        ]
    )
    yield _optimizer(method)


def _tuple(names: Sequence[str]) -> str:
    """One name per line if there are several."""
    if len(names) < 2:
        return tuple_text(names)
    return "(\n" + "".join(f"    {quoted(name)},\n" for name in names) + ")"


def literal(value: Any) -> str:
    """A plain value as Python, with nothing that has to be imported."""
    if isinstance(value, str):
        return quoted(value)
    return re.sub(r"\b(inf|nan)\b", r'float("\1")', repr(value))


def _optimizer(method: Any) -> str:
    """The published base optimizer, with the arguments that are not torch's own defaults."""
    made = method.base_optimizer([nn.Parameter(torch.zeros(1))])
    defaults = inspect.signature(type(made)).parameters
    stated = {
        name: value
        for name, value in made.defaults.items()
        if name in defaults and (name == "lr" or defaults[name].default != value)
    }
    arguments = "".join(f", {name}={literal(value)}" for name, value in stated.items())
    assert type(made).__module__.startswith("torch.optim"), "a base optimizer that is not torch's own"
    return "\n".join(
        [
            "def make_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:",
            f'    """The base optimizer of {method.name}, which takes the preconditioned gradients."""',
            f"    return torch.optim.{type(made).__name__}(parameters{arguments})",
        ]
    )
