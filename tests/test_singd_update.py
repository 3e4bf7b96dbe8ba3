"""One update of SINGD's and IKFAC's roots by itself: oracles Q1 and Q2 of methods.md 15, and properties."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kfac_fx
from tests.oracles import relative_error

TOLERANCE = 1e-10
DAMPING, STEP = 0.02, 0.1
METHODS = {"singd": kfac_fx.SINGD, "ikfac": kfac_fx.IKFAC}


def method_of(name: str, **settings: Any) -> Any:
    return METHODS[name](**{"damping": DAMPING, "lr_cov": STEP, **settings})


def fold(method: Any, state: dict[str, Tensor], a: Tensor, g: Tensor) -> dict[str, Tensor]:
    """One update of one layer with one group. a, g: [d, d]."""
    one = torch.ones((), dtype=a.dtype)
    return {**state, **method.fold(state, {"A": a[None], "G": g[None]}, weight=one, inverse_scale=one)}


def spd(d: int, *, seed: int) -> Tensor:
    """A well conditioned positive definite matrix."""
    draw = torch.randn(d, 2 * d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return draw @ draw.T / (2 * d) + 0.1 * torch.eye(d, dtype=torch.float64)


def test_q1_ikfac_follows_the_inverse_of_the_moving_average_to_second_order() -> None:
    """K K^T = S^-1 becomes ((1-b) S + b (A + lambda I))^-1 up to O(b^2)."""
    torch.manual_seed(5)
    a, g = 0.5 * spd(6, seed=1), spd(4, seed=2)
    root = torch.eye(6, dtype=torch.float64) + 0.1 * torch.randn(6, 6, dtype=torch.float64)
    before = torch.linalg.inv(root @ root.T)
    steps, errors = [1e-1, 1e-2, 1e-3], []
    for step in steps:
        state = {"A_root": root[None], "G_root": torch.eye(4, dtype=torch.float64)[None]}
        moved = fold(kfac_fx.IKFAC(damping=DAMPING, lr_cov=step), state, a, g)["A_root"][0]
        damped = a + DAMPING * torch.eye(6, dtype=torch.float64)
        expected = torch.linalg.inv((1 - step) * before + step * damped)
        errors.append(relative_error(moved @ moved.T, expected))
    for i in (0, 1):
        slope = math.log10(errors[i] / errors[i + 1])
        assert slope == pytest.approx(2, abs=0.1), errors


@pytest.mark.parametrize("name", METHODS)
def test_q2_the_first_update_from_the_identity_has_the_moments_themselves(name: str) -> None:
    a, g = spd(5, seed=3), spd(3, seed=4)
    eyes = {"A": torch.eye(5, dtype=torch.float64), "G": torch.eye(3, dtype=torch.float64)}
    state = {f"{side}_root": eye[None] for side, eye in eyes.items()}
    state |= {f"{side}_momentum": torch.zeros_like(eye)[None] for side, eye in eyes.items()}
    moved = fold(method_of(name), state, a, g)
    weights = (float(g.trace()) / 3, float(a.trace()) / 5) if name == "singd" else (1.0, 1.0)
    for side, moment, weight in (("A", a, weights[0]), ("G", g, weights[1])):
        eye = eyes[side]
        expected = eye - STEP / 2 * (weight * moment + DAMPING * eye - eye)
        assert relative_error(moved[f"{side}_root"][0], expected) < TOLERANCE


def test_singd_does_not_depend_on_how_constants_are_split_between_the_factors_but_ikfac_does() -> None:
    a, g, ends = spd(5, seed=5), spd(3, seed=6), {}
    for name in METHODS:
        pair = []
        for scale in (1.0, 7.0):
            state = {"A_root": torch.eye(5).double()[None], "G_root": torch.eye(3).double()[None]}
            method = method_of(name, **({"alpha1": 0.0} if name == "singd" else {}))
            for _ in range(5):
                state = fold(method, state, scale * a, g / scale)
            pair.append(torch.kron(state["G_root"][0], state["A_root"][0]))
        ends[name] = relative_error(*pair)
    assert ends["singd"] < TOLERANCE and ends["ikfac"] > 1e-2


def test_ikfac_converges_to_the_damped_inverse_of_a_constant_factor() -> None:
    a, g = spd(5, seed=7), spd(3, seed=8)
    state = {"A_root": torch.eye(5).double()[None], "G_root": torch.eye(3).double()[None]}
    for _ in range(600):
        state = fold(method_of("ikfac"), state, a, g)
    for side, factor in (("A", a), ("G", g)):
        root = state[f"{side}_root"][0]
        damped = factor + DAMPING * torch.eye(len(factor), dtype=torch.float64)
        assert relative_error(root @ root.T, torch.linalg.inv(damped)) < TOLERANCE
        assert relative_error(root, torch.linalg.inv(damped)) > 1e-2, "the root alone is no preconditioner"


def test_the_normalised_step_is_bounded_for_each_group_by_itself() -> None:
    method = kfac_fx.IKFAC(lr_cov=0.5, normalize_lr_cov=True)
    small, large = spd(3, seed=9), 1e4 * spd(3, seed=10)
    eyes = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    one = torch.ones((), dtype=torch.float64)
    batch = {"A": torch.stack([small, large]), "G": torch.stack([small, small])}
    moved = method.fold({"A_root": eyes, "G_root": eyes}, batch, weight=one, inverse_scale=one)["A_root"]
    alone = fold(method, {"A_root": eyes[:1], "G_root": eyes[:1]}, small, small)["A_root"]
    assert relative_error(moved[:1], alone) < TOLERANCE
    assert float((moved - eyes).abs().amax()) == pytest.approx(0.5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("side", ["A", "G"])
def test_a_moment_that_is_not_finite_leaves_the_whole_state(name: str, side: str) -> None:
    method = method_of(name)
    state = {"A_root": torch.eye(3)[None], "G_root": torch.eye(3)[None]}
    state |= {"A_momentum": torch.ones(1, 3, 3), "G_momentum": torch.ones(1, 3, 3)}
    moments = {"A": torch.eye(3), "G": torch.eye(3)}
    moments[side] = moments[side] * float("inf")
    after = fold(method, state, moments["A"], moments["G"])
    assert all(torch.equal(after[key], state[key]) for key in state)
    moved = fold(method, state, torch.eye(3), torch.eye(3))
    assert not torch.equal(moved["A_root"], state["A_root"])
