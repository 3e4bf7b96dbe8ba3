"""One K-FAC step of every layer kind against dense algebra written here, and the method's own functions."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fx

TOLERANCE = 1e-10
DAMPING = 0.02


def step_and_state(
    model: nn.Module, x: Tensor, y: Tensor, **options: float | None
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(change of each parameter at lr 1, curvature, gradients) of one step on a copy."""
    twin = copy.deepcopy(model)
    settings = {"damping": DAMPING, "kl_clip": None, "inverse_every": 1, **options}
    step = kfac_fx.compile(
        twin,
        F.cross_entropy,
        method=kfac_fx.KFAC(**settings),  # type: ignore[arg-type]
        optimizer=torch.optim.SGD(twin.parameters(), lr=1.0),
        backend="eager",
    )
    step(x, y)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(named.values()))
    change = {name: (named[name] - p).detach() for name, p in twin.named_parameters()}
    return change, step.state_dict()["curvature"], dict(zip(named, grads, strict=True))


def dense_direction(a: Tensor, g: Tensor, gradient: Tensor) -> Tensor:
    """(G_d (x) A_d)^-1 grad with the damping of the trace pi, by one dense solve. gradient: [o, i]."""
    pi = math.sqrt((a.trace() / len(a)) / (g.trace() / len(g)))
    root = math.sqrt(DAMPING)
    damped_a = a + pi * root * torch.eye(len(a), dtype=a.dtype)
    damped_g = g + root / pi * torch.eye(len(g), dtype=g.dtype)
    flat = torch.linalg.solve(torch.kron(damped_g, damped_a), gradient.reshape(-1))
    return flat.reshape(gradient.shape)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_linear_layers_step_by_the_dense_damped_inverse() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.randint(3, (7,))
    change, state, grads = step_and_state(model, x, y)
    whole = torch.cat([grads["0.weight"], grads["0.bias"][:, None]], 1)
    expected = dense_direction(state["0.weight"]["A"][0], state["0.weight"]["G"][0], whole)
    assert error(torch.cat([change["0.weight"], change["0.bias"][:, None]], 1), expected) < TOLERANCE
    expected = dense_direction(state["2.weight"]["A"][0], state["2.weight"]["G"][0], grads["2.weight"])
    assert error(change["2.weight"], expected) < TOLERANCE


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions_step_by_the_dense_damped_inverse_of_each_group(groups: int) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups), nn.Flatten(), nn.Linear(32, 3)
    )
    model = model.double()
    x, y = torch.randn(5, 4, 4, 4, dtype=torch.float64), torch.randint(3, (5,))
    change, state, grads = step_and_state(model, x, y)
    factors = state["0.weight"]
    assert factors["A"].shape[0] == groups
    out = 8 // groups
    for group in range(groups):
        rows = slice(group * out, (group + 1) * out)
        whole = torch.cat([grads["0.weight"][rows].flatten(1), grads["0.bias"][rows, None]], 1)
        expected = dense_direction(factors["A"][group], factors["G"][group], whole)
        found = torch.cat([change["0.weight"][rows].flatten(1), change["0.bias"][rows, None]], 1)
        assert error(found, expected) < TOLERANCE


def test_embeddings_step_by_the_dense_damped_inverse() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.randint(5, (7, 3)), torch.randint(3, (7,))
    change, state, grads = step_and_state(model, x, y)
    factors = state["0.weight"]
    expected = dense_direction(torch.diag(factors["A"]), factors["G"][0], grads["0.weight"].T)
    assert error(change["0.weight"].T, expected) < TOLERANCE


def test_norms_step_by_the_inverse_of_each_channels_block() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.randint(3, (7,))
    change, state, grads = step_and_state(model, x, y)
    for channel, block in enumerate(state["1.weight"]["F"]):
        gradient = torch.stack([grads["1.weight"][channel], grads["1.bias"][channel]])
        expected = torch.linalg.solve(block + DAMPING * torch.eye(2, dtype=block.dtype), gradient)
        found = torch.stack([change["1.weight"][channel], change["1.bias"][channel]])
        assert error(found, expected) < TOLERANCE


def test_the_moving_average_is_bias_corrected_over_several_batches() -> None:
    torch.manual_seed(4)
    model = nn.Linear(3, 2).double()
    batches = [torch.randn(5, 3, dtype=torch.float64) for _ in range(4)]
    y = torch.randint(2, (5,))
    method = kfac_fx.KFAC(decay=0.7, statistics_every=2, inverse_every=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = kfac_fx.compile(model, F.cross_entropy, method=method, optimizer=optimizer, backend="eager")
    for x in batches:
        step(x, y)
    moments = []
    for x in (batches[0], batches[2]):
        rows = torch.cat([x, torch.ones(5, 1, dtype=x.dtype)], 1)
        moments.append(rows.T @ rows / 5)
    expected = (0.7 * moments[0] + moments[1]) / 1.7
    assert error(step.state_dict()["curvature"]["weight"]["A"][0], expected) < TOLERANCE


def test_the_new_weight_makes_all_weights_sum_to_one() -> None:
    for decay in (0.0, 0.5, 0.95, 0.9999, 1.0):
        method, weights = kfac_fx.KFAC(decay=decay), []
        for count in range(50):
            new = method.new_weight(count)
            weights = [w * (1 - new) for w in weights] + [new]
        assert sum(weights) == pytest.approx(1)
        if 0 < decay < 1:
            assert weights[0] / weights[1] == pytest.approx(decay)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_kl_clip_bounds_the_step_also_for_a_negative_product(sign: float) -> None:
    method = kfac_fx.KFAC(kl_clip=1e-3)
    directions = [torch.randn(1, 2, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)]
    gradients = [sign * v for v in directions]
    rates = torch.tensor([0.5, 0.1], dtype=torch.float64)
    clipped = method.rescale(directions, gradients, learning_rates=rates)
    total = sum((r**2 * (v * g).sum()).abs() for r, v, g in zip(rates, directions, gradients, strict=True))
    nu = float(clipped[0].flatten()[0] / directions[0].flatten()[0])
    assert nu**2 * float(total) == pytest.approx(1e-3)
    assert all(torch.allclose(c, nu * v) for c, v in zip(clipped, directions, strict=True))


def test_the_kl_clip_leaves_short_steps_and_zero_gradients_alone() -> None:
    method = kfac_fx.KFAC(kl_clip=1e-3)
    for size in (0.0, 1e-4):
        directions = [torch.full((1, 2, 2), size)]
        (clipped,) = method.rescale(directions, directions, learning_rates=torch.ones(1))
        assert torch.equal(clipped, directions[0])


def test_a_layer_beyond_the_largest_factor_is_skipped_and_its_neighbour_owns_the_shared_input() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.small = nn.Linear(4, 50), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.small(x) + self.wide(x).sum(1, keepdim=True)

    plan = kfac_fx.inspect(
        Heads(),
        F.cross_entropy,
        torch.randn(5, 4),
        torch.randint(3, (5,)),
        method=kfac_fx.KFAC(max_factor_dim=20),
    )
    assert {s.parameter: s.reason for s in plan.skipped} == {
        "wide.weight": kfac_fx.Reason.TOO_LARGE,
        "wide.bias": kfac_fx.Reason.TOO_LARGE,
    }
    (small,) = plan.matched
    assert small.shared_a == small.key == "small.weight"
