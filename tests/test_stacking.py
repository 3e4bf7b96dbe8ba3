"""Small layers of equal shape are preconditioned in one call, with the results of one by one."""

import copy
import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx import directions, stacking
from kfac_fx.methods import METHODS
from kfac_fx.stacking import stacking_pays
from kfac_fx.traces import Trace
from kfac_fx.types import State
from tests.programs import program
from tests.training import differing, distance, snapshot

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")


class Block(nn.Module):
    """Layers of every structure: three projections of one input, a convolution, a norm, a table."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, 3, padding=1, groups=2)
        self.table = nn.Embedding(5, width)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        mixed = torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x) + self.table(words)
        return self.norm(x + self.conv(mixed.mT).mT)


class Net(nn.Module):
    def __init__(self, blocks: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, words)
        return self.head(x.mean(1))


def batches(count: int) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
    torch.manual_seed(1)
    return [
        ((torch.randn(8, 4, 6).double(), torch.randint(5, (8, 4))), torch.randint(3, (8,)))
        for _ in range(count)
    ]


def trained(model: nn.Module, method: Any, *off: str, count: int = 4, **options: Any) -> kfac_fx.TrainStep:
    with kfac_fx.without_passes(*off):
        step = kfac_fx.compile(model, F.cross_entropy, method=method, **options)
        for inputs, targets in batches(count):
            step(inputs, targets)
    return step


def stacks(step: kfac_fx.TrainStep, variant: str = "plain") -> Counter[int]:
    """How many stacks the preconditioner of a program makes, by how many layers they hold."""
    nodes = step.graphs[variant].graph.find_nodes(op="call_function", target=torch.ops.aten.stack.default)
    return Counter(len(node.args[0]) for node in nodes if node.meta["kfac_fx_pass"] == "precondition")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_as_without_stacks(name: str) -> None:
    torch.manual_seed(0)
    model = Net().double()
    other = copy.deepcopy(model)
    method = METHODS[name](
        statistics_every=2, **({"inverse_every": 2} if METHODS[name].inverse_every else {})
    )
    step = trained(model, method)
    apart = trained(other, method, "stacks")
    assert stacks(step)[18] and not stacks(apart)[18]
    for (key, found), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}")


@given(num=st.integers(6, 8), width=st.integers(1, 9), bias=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_directions_are_those_of_the_dense_formula(num: int, width: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(width, width, bias=bias) for _ in range(num))).double()
    x, y = torch.randn(2 * width + 3, width).double(), torch.randn(2 * width + 3, width).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    method = kfac_fx.KFAC(statistics_every=2, inverse_every=2, kl_clip=None, damping=0.1)
    step = kfac_fx.compile(model, F.mse_loss, method=method, optimizer=optimizer)
    step(x, y)
    twin = copy.deepcopy(model)
    F.mse_loss(twin(x), y).backward()
    step(x, y)
    assert stacks(step) == {num: 4 if bias else 3}
    for place, (layer, before) in enumerate(zip(model, twin, strict=True)):
        assert isinstance(layer, nn.Linear) and isinstance(before, nn.Linear)
        columns = [before.weight.grad, before.bias.grad[:, None]] if bias else [before.weight.grad]
        state = step.state_dict()["curvature"][f"{place}.weight"]
        expected = state["G_inverse"][0] @ torch.cat(columns, 1) @ state["A_inverse"][0]
        torch.testing.assert_close(before.weight - layer.weight, expected[:, :width])
        if bias:
            torch.testing.assert_close(before.bias - layer.bias, expected[:, width])


@dataclass(frozen=True, kw_only=True)
class Noisy(kfac_fx.KFAC):
    """A direction that draws random numbers, which `vmap` refuses; none of them counts."""

    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        return super().precondition(state, gradient) + 0 * torch.rand_like(gradient)


class Renormalised(kfac_fx.KFAC):
    """A direction by an operator that `vmap` would run in a loop, with a warning; it changes nothing."""

    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        direction = super().precondition(state, gradient)
        return direction.flatten(1).renorm(2, 0, 1e9).view_as(direction)


@pytest.mark.parametrize("method", [Noisy, Renormalised])
def test_a_method_without_a_batched_form_goes_layer_by_layer(
    method: type[kfac_fx.KFAC], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = Net().double()
    other = copy.deepcopy(model)
    with caplog.at_level(logging.INFO, "kfac_fx.passes"):
        step = trained(model, method(statistics_every=2))
    assert not stacks(step)[18] and "17 like it, not in a stack: " in caplog.text
    trained(other, kfac_fx.KFAC(statistics_every=2), "stacks")
    assert not differing(snapshot(model), snapshot(other))


class Ones(kfac_fx.KFAC):
    """A direction that reads nothing of the layer but its size."""

    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        return torch.ones(gradient.shape, dtype=gradient.dtype)


class Doubling(torch.optim.SGD):
    """Doubles what it is given, in place."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(2)
        super().step()


@pytest.mark.parametrize("method", [Ones, kfac_fx.KFAC])
def test_updates_of_a_stack_are_no_ones_but_their_layers(method: type[kfac_fx.KFAC]) -> None:
    torch.manual_seed(0)
    model = Net().double()
    other = copy.deepcopy(model)
    settings = {"statistics_every": 2, "inverse_every": 2, "kl_clip": None}
    step = trained(model, method(**settings), optimizer=Doubling(model.parameters(), lr=0.01))
    assert stacks(step)[18]
    trained(other, method(**settings), "stacks", optimizer=torch.optim.SGD(other.parameters(), lr=0.02))
    assert distance(dict(model.state_dict()), dict(other.state_dict())) < 1e-12


def test_stacks_of_many_bytes_pass_through_the_passes_for_eager_programs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(6) for part in (nn.Linear(96, 96), nn.Tanh()))).double()
    other, x = copy.deepcopy(model), torch.randn(4, 20, 96).double()
    monkeypatch.setattr(directions, "stacking_pays", lambda *given: True)
    for net, off in ((model, ()), (other, ("stacks",))):
        with kfac_fx.without_passes(*off):
            step = kfac_fx.compile(net, F.mse_loss, method=kfac_fx.KFAC(statistics_every=2))
            for batch in x:
                step(batch, batch.roll(1))
        assert bool(stacks(step)[6]) == (not off)
    assert distance(dict(model.state_dict()), dict(other.state_dict())) < 1e-12


def test_layers_that_only_look_alike_are_not_stacked() -> None:
    """With a bias, in another type, without a bias or with a frozen one; three parts of one weight alone."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.full = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
            self.bare = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(6))
            self.frozen = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
            self.wide = nn.ModuleList(nn.Linear(4, 4).double() for _ in range(6))
            self.packed = nn.Parameter(torch.randn(12, 4) / 2)
            for layer in self.frozen:
                layer.bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            for layer in (*self.full, *self.bare, *self.frozen):
                x = torch.tanh(layer(x))
            for start in (0, 4, 8):
                x = torch.tanh(F.linear(x, self.packed[start : start + 4]))
            x = x.double()
            for layer in self.wide:
                x = torch.tanh(layer(x))
            return x

    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(9, 4)
    step = kfac_fx.compile(model, F.mse_loss, method=kfac_fx.KFAC(statistics_every=2))
    for _ in range(2):
        step(x, x.double())
    assert stacks(step) == {6: 4 + 4, 12: 3}


def test_large_and_few_layers_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack of large layers copies more than calls cost; where copies are cheap, it takes memory."""

    def direction(gradient: Tensor, a: Tensor, g: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(g, gradient), a)

    def pays(num: int, width: int) -> bool:
        one = program(direction, *(torch.empty(1, width, width) for _ in range(3)))
        return stacking_pays(num, Trace(graph=one.graph, constants={}, names=("direction",)))

    assert [pays(num, 8) for num in (5, 6, 12)] == [False, True, True]
    assert [pays(12, width) for width in (16, 512, 1024)] == [True, False, False]
    monkeypatch.setitem(stacking._RATES, "cpu", stacking._RATES["cuda"])
    assert [pays(num, 512) for num in (12, 96)] == [True, False]


def test_the_log_says_what_is_stacked(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kfac_fx.passes"):
        trained(Net().double(), kfac_fx.KFAC(statistics_every=2), count=2)
    assert "plain: directions of 37 layers, 32 of them like another, 36 in stacks" in caplog.text


def test_nodes_of_a_stack_say_whose_they_are() -> None:
    step = trained(Net().double(), kfac_fx.KFAC(statistics_every=2), count=2)
    nodes = {node.name: node.meta for node in step.graphs["plain"].graph.nodes}
    label = "inserted, preconditioned gradients of blocks.0.q and 17 like it"
    assert nodes["blocks_0_q_direction"]["kfac_fx"] == nodes["blocks_5_v_direction"]["kfac_fx"] == label
