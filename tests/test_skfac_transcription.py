"""SKFAC step by step against a transcription of its formulas in plain PyTorch: hooks and dense algebra.

The reference imports nothing of the library. It keeps the last batches' columns U of every layer, builds
U U^T + gamma I as a dense matrix, inverts it densely and runs SGD by hand (methods.md 4.1 to 4.7). A side
whose window has no fewer columns than rows keeps them all, as the library's dense factors do.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from tests.oracles import append_one, conv_patches, relative_error

LR, MOMENTUM, DECAY, WEIGHT_DECAY = 0.01, 0.9, 0.6, 5e-4
TOLERANCE = 1e-10


class ConvNet(nn.Module):
    """Two convolutions with bias, one of them wide, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 5, 3, padding=1)
        self.second = nn.Conv2d(5, 12, 3, stride=2)
        self.third, self.last = nn.Linear(48, 9), nn.Linear(9, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.last(torch.tanh(self.third(x.flatten(1))))


@dataclass
class Layer:
    """One layer of the reference: its columns of the last batches, newest first, and its dense inverses."""

    module: nn.Module
    a: Tensor = field(default_factory=lambda: torch.empty(0))
    g: Tensor = field(default_factory=lambda: torch.empty(0))
    columns_a: list[Tensor] = field(default_factory=list)
    columns_g: list[Tensor] = field(default_factory=list)
    inverse_a: Tensor = field(default_factory=lambda: torch.empty(0))
    inverse_g: Tensor = field(default_factory=lambda: torch.empty(0))
    momentum: Tensor | None = None


class Reference:
    """Plain SKFAC for the model, empirical Fisher of a mean cross-entropy."""

    def __init__(
        self, model: nn.Module, *, damping: float, rule: str, scale: str, window: int, every: tuple[int, int]
    ) -> None:
        self.model, self.damping, self.rule, self.scale = model, damping, rule, scale
        self.window, self.every, self.step_count = window, every, 0
        kinds = (nn.Conv2d, nn.Linear)
        self.layers = {n: Layer(m) for n, m in model.named_modules() if isinstance(m, kinds)}
        for layer in self.layers.values():

            def hook(module: nn.Module, args: tuple[Tensor], output: Tensor, layer: Layer = layer) -> None:
                layer.a = args[0].detach()
                output.register_hook(lambda g: setattr(layer, "g", g.detach()))

            layer.module.register_forward_hook(hook)

    def columns(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """U_A [d_A, N] and U_G [d_G, N] of the batch that was just run: strategy S1 for convolutions."""
        num = len(layer.a)
        if isinstance(layer.module, nn.Conv2d):
            patches = conv_patches(layer.module, layer.a).flatten(2)  # [N, T, C K]
            a, g = patches.mean(1), layer.g.flatten(2)
            g = g.sum(2) if self.scale == "exact" else g.mean(2)
        else:
            a, g = layer.a, layer.g
        if layer.module.bias is not None:
            a = append_one(a)
        return a.T / math.sqrt(num), num * g.T / math.sqrt(num)  # g of the mean loss is 1/N of an example's

    def kept(self, columns: Tensor) -> int | None:
        """How many batches are averaged: the window, or all where that is no saving."""
        full = self.window > 1 and columns.shape[1] * self.window >= columns.shape[0]
        return None if full else self.window

    def factor(self, columns: list[Tensor]) -> Tensor:
        """The moving average over the window, weights made to sum to one."""
        weights = [DECAY**age for age in range(len(columns))]
        pairs = zip(weights, columns, strict=True)
        return sum(w * u @ u.T for w, u in pairs) / sum(weights)  # type: ignore[return-value]

    def refresh(self, layer: Layer) -> None:
        a, g = self.factor(layer.columns_a), self.factor(layer.columns_g)
        pi = math.sqrt((a.trace() / len(a)) / (g.trace() / len(g))) if self.rule == "factored" else 1.0
        root = math.sqrt(self.damping)
        layer.inverse_a = torch.linalg.inv(a + pi * root * torch.eye(len(a), dtype=a.dtype))
        layer.inverse_g = torch.linalg.inv(g + root / pi * torch.eye(len(g), dtype=g.dtype))

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step; the directions V stay in `self.directions`."""
        loss = F.cross_entropy(self.model(x), y)
        self.model.zero_grad()
        loss.backward()
        collects, inverts = (self.step_count % every == 0 for every in self.every)
        self.directions: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            if collects:
                a, g = self.columns(layer)
                layer.columns_a = [a, *layer.columns_a][: self.kept(a)]
                layer.columns_g = [g, *layer.columns_g][: self.kept(g)]
            if inverts:
                self.refresh(layer)
            self.directions[name] = self.update(layer)
        self.step_count += 1
        return loss.detach()

    @torch.no_grad()
    def update(self, layer: Layer) -> Tensor:
        """V = G^-1 grad A^-1, then V + wd theta into the heavy ball."""
        weight, bias = layer.module.weight, layer.module.bias
        gradient, theta = weight.grad.flatten(1), weight.flatten(1)
        if bias is not None:
            gradient = torch.cat([gradient, bias.grad[:, None]], 1)
            theta = torch.cat([theta, bias[:, None]], 1)
        direction = layer.inverse_g @ gradient @ layer.inverse_a
        moved = direction + WEIGHT_DECAY * theta
        layer.momentum = moved if layer.momentum is None else MOMENTUM * layer.momentum + moved
        change = LR * layer.momentum
        weight -= (change if bias is None else change[:, :-1]).view_as(weight)
        if bias is not None:
            bias -= change[:, -1]
        return direction


def state_inverse(state: dict[str, Tensor], side: str) -> Tensor:
    """What the library applies on one side, as a matrix."""
    if f"{side}_inverse" in state:
        return state[f"{side}_inverse"][0]
    z, gamma = state[f"{side}_z"][0], state[f"{side}_gamma"][0]
    return (torch.eye(z.shape[1], dtype=z.dtype) - z.T @ z) / gamma


def state_factor(state: dict[str, Tensor], side: str, window: int) -> Tensor:
    """The factor that the library keeps on one side, as a matrix."""
    if side in state:
        return state[side][0]
    blocks, weights = state[f"{side}_rows"][0].unflatten(0, (window, -1)), state[f"{side}_weights"]
    return torch.einsum("w,wmi,wmj->ij", weights / weights.sum(), blocks, blocks)


def direction_of(step: kfac_fx.TrainStep, model: nn.Module, before: dict[str, Tensor], name: str) -> Tensor:
    """V from the change of the momentum buffers: [d_out, d_in (+1)]."""
    parts = []
    for part in ("weight", "bias"):
        key = f"{name}.{part}"
        parameter = dict(model.named_parameters()).get(key)
        if parameter is None:
            continue
        buffer = step.optimizer.state[parameter]["momentum_buffer"]
        old, theta = before[f"momentum {key}"], before[key]
        parts.append((buffer - MOMENTUM * old - WEIGHT_DECAY * theta).reshape(len(parameter), -1))
    return torch.cat(parts, 1)


def snapshot(step: kfac_fx.TrainStep, model: nn.Module) -> dict[str, Tensor]:
    kept = {}
    for name, parameter in model.named_parameters():
        state = step.optimizer.state.get(parameter, {})
        kept[name] = parameter.detach().clone()
        kept[f"momentum {name}"] = state.get("momentum_buffer", torch.zeros_like(parameter)).clone()
    return kept


CASES = {
    "recommended": {"rule": "factored", "scale": "exact", "window": 1, "every": (3, 3)},
    "published": {"rule": "sqrt", "scale": "paper", "window": 1, "every": (4, 4)},
    "window": {"rule": "factored", "scale": "exact", "window": 3, "every": (1, 2)},
    "published-window": {"rule": "sqrt", "scale": "paper", "window": 3, "every": (2, 6)},
}


@pytest.mark.parametrize("case", CASES)
def test_thirty_steps_equal_the_transcription(case: str) -> None:
    settings = CASES[case]
    model, num = ConvNet().double(), 3
    twin = ConvNet().double()
    twin.load_state_dict(model.state_dict())
    reference = Reference(twin, damping=0.1, **settings)  # type: ignore[arg-type]
    method = kfac_fx.SKFAC(
        damping=0.1,
        damping_rule=settings["rule"],
        scale=settings["scale"],
        window=settings["window"],
        decay=DECAY if settings["window"] > 1 else 0.95,
        statistics_every=settings["every"][0],
        inverse_every=settings["every"][1],
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    step = kfac_fx.compile(model, F.cross_entropy, method=method, optimizer=optimizer, backend="eager")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    forms = set()
    for _ in range(30):
        x, y = torch.randn(num, 2, 6, 6, dtype=torch.float64), torch.randint(3, (num,))
        before = snapshot(step, model)
        assert relative_error(step(x, y), reference.step(x, y)) < TOLERANCE
        curvature = step.state_dict()["curvature"]
        for name, layer in reference.layers.items():
            state = curvature[f"{name}.weight"]
            forms |= set(state)
            for side, columns in (("A", layer.columns_a), ("G", layer.columns_g)):
                found = state_factor(state, side, settings["window"])
                assert relative_error(found, reference.factor(columns)) < TOLERANCE
                inverse = layer.inverse_a if side == "A" else layer.inverse_g
                assert relative_error(state_inverse(state, side), inverse) < TOLERANCE
            direction = direction_of(step, model, before, name)
            assert relative_error(direction, reference.directions[name]) < TOLERANCE
    for (name, found), (_, expected) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert relative_error(found.detach(), expected.detach()) < TOLERANCE
        assert relative_error(found.detach(), start[name]) > 0.01
    assert {"A_z", "A_gamma", "G_z" if settings["window"] == 1 else "G_inverse"} <= forms


@pytest.mark.parametrize(
    "change", [{"scale": "paper"}, {"damping_rule": "sqrt"}, {"window": 2, "decay": DECAY}]
)
def test_the_comparison_sees_every_setting(change: dict[str, Any]) -> None:
    model, twin = ConvNet().double(), ConvNet().double()
    twin.load_state_dict(model.state_dict())
    reference = Reference(twin, damping=0.1, **CASES["recommended"])  # type: ignore[arg-type]
    method = kfac_fx.SKFAC(damping=0.1, statistics_every=3, inverse_every=3, **change)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    step = kfac_fx.compile(model, F.cross_entropy, method=method, optimizer=optimizer, backend="eager")
    for _ in range(4):
        batch = torch.randn(3, 2, 6, 6, dtype=torch.float64), torch.randint(3, (3,))
        step(*batch)
        reference.step(*batch)
    assert relative_error(model.first.weight.detach(), twin.first.weight.detach()) > 1e-5
