"""The tensors of a model in one walk: those of PyTorch's own walks, under their names, in their order."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from kfac_fx.contents import Contents


class Shared(nn.Module):
    """One module and one parameter under two names, a tensor that is missing, one that is both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.again = self.first
        self.tied = nn.Linear(2, 3, bias=False)
        self.tied.weight = self.first.weight
        self.register_buffer("mean", torch.zeros(3), persistent=False)
        self.register_buffer("nothing", None)
        self.register_buffer("same", self.mean)
        self.inner = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(), nn.Dropout()).eval()


def single() -> nn.Module:
    return nn.Bilinear(2, 3, 4)


def both() -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_buffer("also", model.weight)
    return model


def parametrised() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(3, 2)), nn.LSTM(2, 2), nn.TransformerEncoderLayer(4, 2))


class Renamed(nn.Sequential):
    """Names of its own."""

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in super().named_parameters(*args, **options):
            yield f"net.{name}", parameter


def renamed() -> nn.Module:
    return Renamed(nn.Linear(3, 3), nn.BatchNorm1d(3))


@pytest.mark.parametrize("make", [Shared, single, both, parametrised, renamed])
def test_contents_are_what_torch_finds(make: Callable[[], nn.Module]) -> None:
    model = make()
    found = Contents.of(model)
    for own, expected in (
        (found.parameters, dict(model.named_parameters())),
        (found.buffers, dict(model.named_buffers())),
    ):
        assert list(own) == list(expected)
        assert all(own[name] is expected[name] for name in own)
    assert found.training == tuple(module.training for module in model.modules())
    assert [*map(id, found.tensors)] == [*map(id, [*model.parameters(), *model.buffers()])]
