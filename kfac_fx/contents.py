"""Parameters and buffers of a model, looked up in one walk over its modules.

Enters: a model. Leaves: its tensors by name. Each of `named_parameters`, `named_buffers` and `modules` is a
walk of its own, and a step needs them all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar, final

from torch import Tensor, nn

T = TypeVar("T", bound=Tensor)
_NAMING = ("named_parameters", "named_buffers")  # a model of its own kind may give other names


@final
@dataclass(frozen=True, kw_only=True)
class Contents:
    """Parameters and buffers, each under its first name, and the mode of each module; in order."""

    parameters: Mapping[str, nn.Parameter]
    buffers: Mapping[str, Tensor]
    training: tuple[bool, ...]

    @staticmethod
    def of(model: nn.Module) -> Contents:
        """Those of now."""
        if any(getattr(type(model), name) is not getattr(nn.Module, name) for name in _NAMING):
            parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
            return Contents(
                parameters=parameters, buffers=buffers, training=tuple(m.training for m in model.modules())
            )
        parameters, buffers, training = {}, {}, []
        for path, module in model.named_modules():
            training.append(module.training)
            prefix = f"{path}." if path else ""
            parameters |= {prefix + name: tensor for name, tensor in module._parameters.items()}
            buffers |= {prefix + name: tensor for name, tensor in module._buffers.items()}
        return Contents(parameters=_once(parameters), buffers=_once(buffers), training=tuple(training))

    @property
    def tensors(self) -> list[Tensor]:
        """Parameters, then buffers: as programs take them."""
        return [*self.parameters.values(), *self.buffers.values()]

    def changing(self, names: Collection[str]) -> dict[str, Tensor]:
        """The buffers of these names."""
        return {name: buffer for name, buffer in self.buffers.items() if name in names}


def _once(named: Mapping[str, T | None]) -> dict[str, T]:
    """Each tensor under its first name."""
    first: dict[int, str] = {}
    for name, tensor in named.items():
        first.setdefault(id(tensor), name)
    return {
        name: tensor for name, tensor in named.items() if tensor is not None and first[id(tensor)] == name
    }
