"""The captures that other test files share: of equal models alone, and nobody writes into them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx import trace
from kfac_fx.batch import flatten_batch
from kfac_fx.capture import capture
from kfac_fx.methods import METHODS
from tests.shared_captures import facts, remembering


class Net(nn.Module):
    """A model with an attribute that its text does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.first, self.norm = 1.0, nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.slope * torch.tanh(self.norm(self.first(x))))


X, Y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])


def tied(net: Net) -> None:
    net.norm.bias = net.first.bias


def frozen(net: Net) -> None:
    net.first.bias.requires_grad_(False)


def sloped(net: Net) -> None:
    net.slope = 2.0


def hooked(net: Net) -> None:
    net.first.register_forward_hook(lambda module, inputs, output: 2 * output)


def replaced(net: Net) -> None:
    net.last = nn.Linear(4, 3, bias=False)


def with_own_forward(net: Net) -> None:
    net.forward = lambda x: net.last(x)  # type: ignore[method-assign]


def columns(net: Net) -> None:
    net.first.weight.data = net.first.weight.data.t().contiguous().t()


@pytest.mark.parametrize(
    "change", [tied, frozen, sloped, hooked, replaced, with_own_forward, columns, nn.Module.eval, Net.double]
)
def test_a_model_that_differs_gets_a_capture_of_its_own(change: Callable[[Any], Any]) -> None:
    shared, other = remembering(capture), Net()
    known = shared(Net(), F.cross_entropy, flatten_batch(X, Y))
    assert shared(Net(), F.cross_entropy, flatten_batch(X, Y)) is known
    change(other)
    x = X.to(other.last.weight.dtype)
    assert shared(other, F.cross_entropy, flatten_batch(x, Y)) is not known


def test_another_batch_loss_or_fisher_gets_a_capture_of_its_own() -> None:
    shared, net = remembering(capture), Net()
    batch = flatten_batch(X, Y)
    found = [
        shared(net, F.cross_entropy, batch),
        shared(net, F.cross_entropy, flatten_batch(X[:3], Y[:3])),
        shared(net, F.cross_entropy, flatten_batch({"x": X}, Y)),
        shared(net, F.cross_entropy, flatten_batch(X.t().contiguous().t(), Y)),
        shared(net, lambda output, target: F.cross_entropy(output, target), batch),
        shared(net, None, batch),
        shared(net, F.cross_entropy, batch, fisher="mc"),
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found.append(shared(net, F.cross_entropy, batch))
    assert len({id(captured) for captured in found}) == len(found)


def test_nothing_that_a_method_does_writes_into_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    captures, before = [], []

    def noted(*args: Any, **options: Any) -> Any:
        captures.append(capture(*args, **options))
        before.append(copy.deepcopy(list(facts(captures[-1]))))  # nobody has had it in hands yet
        return captures[-1]

    monkeypatch.setattr(trace, "capture", remembering(noted))
    for name in METHODS:
        step = kfac_fx.compile(Net(), F.cross_entropy, method=name, backend="eager")
        step.accumulate(X, Y)
        step.update()
        step(X, Y)
        assert len(captures) == 1
        assert list(facts(captures[0])) == before[0], name
