"""Methods of one's own: a method that works in place is refused by name, with what to write instead."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
from kfac_fx.errors import KfacFxError


@final
@dataclass(frozen=True, kw_only=True)
class InPlace(kfac_fx.KFAC):
    name = "in_place"

    def precondition(self, state: Mapping[str, Tensor], gradient: Tensor) -> Tensor:
        return super().precondition(state, gradient.mul_(2))


@final
@dataclass(frozen=True, kw_only=True)
class OutOfPlace(kfac_fx.KFAC):
    name = "out_of_place"

    def precondition(self, state: Mapping[str, Tensor], gradient: Tensor) -> Tensor:
        return super().precondition(state, gradient * 2)


def stepped(method: kfac_fx.KFAC) -> Tensor:
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2)
    step = kfac_fx.compile(model, nn.MSELoss(), method=method, backend="eager")
    step(x, y)  # without a program that preconditions: there were no statistics
    before = model.weight.detach().clone()
    step(x, y)
    return model.weight.detach() - before


def test_a_method_that_works_in_place_is_refused_with_its_line_and_the_remedy() -> None:
    with pytest.raises(KfacFxError) as raised:
        stepped(InPlace())
    message = str(raised.value)
    assert "works in place, by aten.mul_.Tensor" in message
    assert "test_own_method.py:" in message and "gradient.mul_(2)" in message
    assert "write x * 2 instead of x.mul_(2)" in message


def test_the_remedy_works() -> None:
    assert bool(torch.isfinite(stepped(OutOfPlace())).all())
