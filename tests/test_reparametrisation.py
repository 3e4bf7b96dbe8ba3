"""Undamped steps do not depend on affine coordinates of activations and pre-activations (oracle I2).

Grosse & Martens 2016 (arXiv:1602.01407), theorem 3; here through the compiled step itself. A network is
written twice: s = Ph s+ and a+ = Om a + c, so that W1+ = Ph^-1 W1, W2+ = W2 Om^-1 and b2+ = b2 - W2 Om^-1 c.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from tests.oracles import relative_error

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

STEPS, RATE = 3, 0.1


class Coordinates(nn.Module):
    """a+ = Om tanh(Ph s+) + c over the channels: fixed, not trained."""

    def __init__(self, width: int, *, identity: bool) -> None:
        super().__init__()
        eye, zero = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        omega, phi, shift = (
            torch.randn_like(eye) + 2 * eye,
            torch.randn_like(eye) + 2 * eye,
            torch.randn_like(zero),
        )
        self.register_buffer("omega", eye if identity else omega)
        self.register_buffer("phi", eye if identity else phi)
        self.register_buffer("shift", zero if identity else shift)

    def forward(self, s: Tensor) -> Tensor:
        s = s.movedim(1, -1)
        return ((s @ self.phi.T).tanh() @ self.omega.T + self.shift).movedim(-1, 1)


def rewritten(original: nn.Sequential) -> nn.Sequential:
    """The same function with other coordinates behind every layer that has `Coordinates` after it."""
    other = copy.deepcopy(original)
    for index, module in enumerate(other):
        if not isinstance(module, Coordinates):
            continue
        width = len(module.shift)
        module = other[index] = Coordinates(width, identity=False)
        before, after = other[index - 1], other[index + 1]
        with torch.no_grad():
            flat = torch.linalg.solve(module.phi, before.weight.flatten(1))
            before.weight.copy_(flat.view_as(before.weight))
            before.bias.copy_(torch.linalg.solve(module.phi, before.bias))
            kernel = torch.einsum("oi...,ij->oj...", after.weight, torch.linalg.inv(module.omega))
            after.weight.copy_(kernel)
            after.bias.sub_(torch.einsum("oi...,i->o", kernel, module.shift))
    return other


def case(kind: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    """(network, inputs, labels); convolutions without padding, since zeros are not mapped to the shift."""
    torch.manual_seed(0)
    if kind == "mlp":
        layers = [nn.Linear(5, 4), Coordinates(4, identity=True), nn.Linear(4, 3)]
        x = torch.randn(64, 5, dtype=torch.float64)
    else:
        layers = [
            nn.Conv2d(2, 3, 1),
            Coordinates(3, identity=True),
            nn.Conv2d(3, 3, 2),
            Coordinates(3, identity=True),
            nn.Conv2d(3, 3, 3),
            nn.Flatten(),
        ]
        x = torch.randn(64, 2, 4, 4, dtype=torch.float64)
    return nn.Sequential(*layers).double(), x, torch.randint(3, (64,))


def trained(model: nn.Module, x: Tensor, y: Tensor, method: Any) -> Tensor:
    """Outputs after a few steps of a copy; by plain gradients if there is no method."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    exclude = ("*",) if method is None else ()
    step = kfac_fx.compile(
        model,
        F.cross_entropy,
        method=method or "kfac",
        optimizer=optimizer,
        fisher="type2",
        exclude=exclude,
        backend="eager",
    )
    for _ in range(STEPS):
        step(x, y)
    return model(x).detach()


def undamped(kind: str, **settings: Any) -> Any:
    cls = {"kfac": kfac_fx.KFAC, "kfc": kfac_fx.KFC}[kind]
    return cls(**{"damping": 0.0, "kl_clip": None, "decay": 0.0, "inverse_every": 1, **settings})


def difference(kind: str, method: Any) -> tuple[float, float]:
    """(distance of the outputs of both networks after training, distance from the start)."""
    original, x, y = case(kind)
    other, start = rewritten(original), original(x).detach()
    assert relative_error(other(x).detach(), start) < 1e-12
    ends = [trained(model, x, y, method) for model in (original, other)]
    return relative_error(ends[1], ends[0]), relative_error(ends[0], start)


BY_CHANNEL = {"spatially_uncorrelated_activations": True}


@pytest.mark.parametrize(
    ("kind", "name", "settings"),
    [
        ("mlp", "kfac", {}),
        ("mlp", "kfac", {"damping_rule": "tikhonov"}),
        ("mlp", "kfc", {}),
        ("convolutions", "kfac", {}),
        ("convolutions", "kfc", {}),
        ("convolutions", "kfc", BY_CHANNEL),
        ("convolutions", "kfc", {"kl_clip": 1e-3}),
    ],
)
def test_i2_undamped_steps_do_not_see_the_coordinates(kind: str, name: str, settings: dict) -> None:
    apart, moved = difference(kind, undamped(name, **settings))
    assert apart < 1e-10
    assert moved > 1e-2


@pytest.mark.parametrize("rule", ["tikhonov", "factored"])
@pytest.mark.parametrize("kind", ["mlp", "convolutions"])
def test_i2_damped_steps_do(kind: str, rule: str) -> None:
    assert difference(kind, undamped("kfac", damping=1e-2, damping_rule=rule))[0] > 1e-2


@pytest.mark.parametrize("kind", ["mlp", "convolutions"])
def test_i2_plain_gradient_steps_do(kind: str) -> None:
    assert difference(kind, None)[0] > 1e-2
