"""What must not change the curvature or the step, and what bounds the step (oracles I1 to I4).

The affine invariance holds for undamped K-FAC only, so that test preconditions with pseudo-inverses of the
library's factors by itself.
"""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
from tests.helpers import factor_reader, gradients, one_step
from tests.oracles import relative_error

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

Direction = Callable[[Tensor, Tensor, Tensor], Tensor]


class Affine(nn.Module):
    """`matrix @ activation + shift` over the channels, of the activation of `inner @ input`."""

    def __init__(self, inner: Tensor, matrix: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("inner", inner)
        self.register_buffer("matrix", matrix)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.movedim(1, -1)
        mapped = (channels @ self.inner.T).tanh() @ self.matrix.T + self.shift
        return mapped.movedim(-1, 1)


def affine_pair(layers: list[nn.Module], width: int, *, shifted: bool) -> tuple[nn.Module, nn.Module]:
    """A two-layer network and the same function in other coordinates of its hidden channels."""
    eye, zero = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    omega, phi = (torch.randn_like(eye) + 2 * eye for _ in range(2))
    shift = torch.randn_like(zero) if shifted else zero
    original = nn.Sequential(layers[0], Affine(eye, eye, zero), *layers[1:]).double()
    other = copy.deepcopy(original)
    other[1] = Affine(phi, omega, shift)
    first, second = other[0], other[2]
    with torch.no_grad():
        flat = first.weight.flatten(1)
        first.weight.copy_(torch.linalg.solve(phi, flat).view_as(first.weight))
        first.bias.copy_(torch.linalg.solve(phi, first.bias))
        kernel = torch.einsum("oi...,ij->oj...", second.weight, torch.linalg.inv(omega))
        second.weight.copy_(kernel)
        second.bias.sub_(torch.einsum("oi...,i->o", kernel, shift))
    return original, other


def undamped(A: Tensor, G: Tensor, gradient: Tensor) -> Tensor:
    inverses = [torch.linalg.pinv(factor, rtol=1e-10, hermitian=True) for factor in (A, G)]
    return inverses[1] @ gradient @ inverses[0]


def damped(A: Tensor, G: Tensor, gradient: Tensor) -> Tensor:
    l_A, Q_A = torch.linalg.eigh(A)
    l_G, Q_G = torch.linalg.eigh(G)
    return Q_G @ ((Q_G.T @ gradient @ Q_A) / (torch.outer(l_G, l_A) + 1e-2)) @ Q_A.T


def plain(A: Tensor, G: Tensor, gradient: Tensor) -> Tensor:
    return gradient


def train(model: nn.Module, x: Tensor, y: Tensor, *, direction: Direction, steps: int = 3) -> Tensor:
    """Outputs after a few steps along `direction(A, G, joint gradient)` with the library's type-2 factors."""
    loss_fn = nn.CrossEntropyLoss()
    read = factor_reader(model, loss_fn, fisher="type2")
    for _ in range(steps):
        curvature = read(x, y)
        grads = gradients(model, loss_fn, x, y)
        for name, state in curvature.items():
            weight, bias = (model.get_parameter(name.replace("weight", kind)) for kind in ("weight", "bias"))
            bias_gradient = grads[name.replace("weight", "bias")][:, None]
            joint = torch.cat([grads[name].flatten(1), bias_gradient], dim=1)
            change = 0.1 * direction(state["A"][0], state["G"][0], joint)
            with torch.no_grad():
                weight.sub_(change[:, :-1].reshape(weight.shape))
                bias.sub_(change[:, -1])
    return model(x).detach()


def affine_case(kind: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    if kind == "mlp":
        pair = affine_pair([nn.Linear(5, 4), nn.Linear(4, 3)], 4, shifted=True)
        x = torch.randn(64, 5, dtype=torch.float64)
    elif kind == "valid convolution":
        layers = [nn.Conv2d(2, 3, 2), nn.Conv2d(3, 3, 3), nn.Flatten()]
        pair = affine_pair(layers, 3, shifted=True)
        x = torch.randn(32, 2, 4, 4, dtype=torch.float64)
    else:
        layers = [nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.AvgPool2d(4), nn.Flatten()]
        pair = affine_pair(layers, 3, shifted=False)
        x = torch.randn(16, 2, 4, 4, dtype=torch.float64)
    return *pair, x, torch.randint(3, (len(x),))


@pytest.mark.parametrize("kind", ["mlp", "valid convolution", "padded convolution, no shift"])
def test_i2_undamped_steps_do_not_see_affine_coordinates(kind: str) -> None:
    original, other, x, y = affine_case(kind)
    start = original(x).detach()
    assert relative_error(other(x).detach(), start) < 1e-12
    ends = [train(model, x, y, direction=undamped) for model in (original, other)]
    assert relative_error(ends[1], ends[0]) < 1e-10
    assert relative_error(ends[0], start) > 1e-2


@pytest.mark.parametrize("direction", [damped, plain])
def test_i2_damped_and_plain_steps_do_see_them(direction: Direction) -> None:
    original, other, x, y = affine_case("mlp")
    ends = [train(model, x, y, direction=direction) for model in (original, other)]
    assert relative_error(ends[1], ends[0]) > 1e-2


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Tanh(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(12, 3)
    )


def batch(dtype: torch.dtype = torch.float64, size: int = 7) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(size, 2, 4, 4, dtype=dtype), torch.randint(3, (size,))


@pytest.mark.parametrize(
    ("fisher", "scale"), [("type2", 2.0**10), ("empirical", 2.0**10), ("empirical", 1e-3)]
)
def test_i1_a_scaled_loss_scales_G_once_and_is_undone_by_scaled_damping(fisher: str, scale: float) -> None:
    """As its Hessian does: A does not see the scale, G carries it once, the direction not at all."""
    x, y = batch()
    model, loss_fn = network().double(), nn.CrossEntropyLoss()
    once, scaled = (
        one_step(
            model,
            lambda f, t, s=s: s * loss_fn(f, t),
            x,
            y,
            method=kfac_fx.KFAC(damping=1e-2 * s, kl_clip=None),
            fisher=fisher,
        )
        for s in (1.0, scale)
    )
    for name, state in once.curvature.items():
        assert relative_error(scaled.curvature[name]["A"], state["A"]) < 1e-12
        assert relative_error(scaled.curvature[name]["G"], scale * state["G"]) < 1e-12
    for name, change in once.change.items():
        assert relative_error(scaled.change[name], change) < 1e-10


@pytest.mark.parametrize(
    ("reduction", "fisher", "sharing"),
    [
        ("mean", "type2", "expand"),
        ("sum", "type2", "reduce"),
        ("mean", "empirical", "reduce"),
        ("sum", "empirical", "expand"),
    ],
)
def test_i3_duplicated_and_permuted_examples(reduction: str, fisher: str, sharing: str) -> None:
    x, y = batch()
    read = factor_reader(
        network().double(), nn.CrossEntropyLoss(reduction=reduction), fisher=fisher, sharing=sharing
    )
    order = torch.randperm(len(x))
    once, mixed = read(x, y), read(x[order], y[order])
    twice = read(x.repeat(2, 1, 1, 1), y.repeat(2))
    growth = 2.0 if reduction == "sum" else 1.0
    for name, state in once.items():
        assert relative_error(twice[name]["A"], state["A"]) < 1e-12
        assert relative_error(twice[name]["G"], growth * state["G"]) < 1e-12
        assert relative_error(mixed[name]["A"], state["A"]) < 1e-12
        assert relative_error(mixed[name]["G"], state["G"]) < 1e-12


def clipped_and_free(kappa: float, lr: float) -> tuple[list[dict[str, Tensor]], float]:
    """Parameter changes of one step with and without the clip, and the unclipped <V, gradient>."""
    x, y = batch()
    model, loss_fn = network().double(), nn.CrossEntropyLoss()
    changes = [
        one_step(model, loss_fn, x, y, method=kfac_fx.KFAC(kl_clip=clip), fisher="empirical", lr=lr).change
        for clip in (kappa, None)
    ]
    grads = gradients(model, loss_fn, x, y)
    return changes, sum((-changes[1][name] / lr * grads[name]).sum().item() for name in grads)


@pytest.mark.parametrize("lr", [0.1, 1.0])
def test_i4_an_active_clip_meets_its_bound_with_one_factor_for_all_layers(lr: float) -> None:
    kappa = 1e-5
    (clipped, free), product = clipped_and_free(kappa, lr)
    nu = math.sqrt(kappa / (lr**2 * product))
    assert 0 < nu < 0.9
    for name, change in free.items():
        assert relative_error(clipped[name], nu * change) < 1e-12
    ratio = clipped["0.weight"].norm().item() / free["0.weight"].norm().item()
    assert abs(ratio**2 * lr**2 * product / kappa - 1) < 1e-12


def test_i4_an_inactive_clip_changes_nothing() -> None:
    (clipped, free), product = clipped_and_free(1e6, 0.1)
    assert 0.1**2 * product < 1e6
    for name, change in free.items():
        assert torch.equal(clipped[name], change)


def test_i4_a_zero_gradient_is_not_divided_by() -> None:
    x, _ = batch()
    model = network().double()
    y = model(x).detach()
    method = kfac_fx.KFAC(kl_clip=1e-3)
    result = one_step(model, nn.MSELoss(), x, y, method=method, fisher="empirical", lr=0.1)
    for change in result.change.values():
        assert torch.equal(change, torch.zeros_like(change))
