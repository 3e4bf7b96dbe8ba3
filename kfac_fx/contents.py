"""Parameters and buffers of a model, looked up in one walk over its modules.

Enters: a model. Leaves: its tensors by name. Each of `named_parameters`, `named_buffers` and `modules` is a
walk of its own, and a step needs them all: for a model of many small modules that took a fifth of its time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn


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
        parameters: dict[str, nn.Parameter] = {}
        buffers: dict[str, Tensor] = {}
        training = []
        seen: tuple[set[int], set[int]] = set(), set()
        for path, module in model.named_modules():
            training.append(module.training)
            prefix = f"{path}." if path else ""
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in seen[0]:
                    seen[0].add(id(parameter))
                    parameters[prefix + name] = parameter
            for name, buffer in module._buffers.items():
                if buffer is not None and id(buffer) not in seen[1]:
                    seen[1].add(id(buffer))
                    buffers[prefix + name] = buffer
        return Contents(parameters=parameters, buffers=buffers, training=tuple(training))

    @property
    def tensors(self) -> list[Tensor]:
        """Parameters, then buffers: as programs take them."""
        return [*self.parameters.values(), *self.buffers.values()]

    def changing(self, names: Collection[str]) -> dict[str, Tensor]:
        """The buffers of these names."""
        return {name: buffer for name, buffer in self.buffers.items() if name in names}
