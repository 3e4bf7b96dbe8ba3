"""NKFAC's own functions: averages, schedule, refresh, lengths.

Oracles I5, N7, N9, Y4 and Y5 of methods.md section 15.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fx
from kfac_fx.methods import nkfac
from kfac_fx.types import State


def normal(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64)


def spd(*sizes: int) -> Tensor:
    rows = normal(*sizes, sizes[-1])
    return rows.mT @ rows


def state_of(d_in: int, d_out: int, *, dtype: torch.dtype = torch.float64, device: str = "cpu") -> State:
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    pair = {
        "A": torch.zeros(1, d_in, d_in, **options),
        "G": torch.zeros(1, d_out, d_out, **options),
    }
    eyes = {f"{n}_inverse": torch.eye(t.shape[-1], **options).unsqueeze(0) for n, t in pair.items()}
    return {**pair, **eyes}


def folded(method: kfac_fx.NKFAC, state: State, batch: State, *, inverse_scale: float = 1.0) -> State:
    weight = torch.tensor(method.new_weight(0), dtype=torch.float64)
    scale = torch.tensor(inverse_scale, dtype=torch.float64)
    return {**state, **method.fold(state, batch, weight=weight, inverse_scale=scale)}


# ---------------------------------------------------------------- statistics


def test_identical_batches_average_to_a_geometric_share_of_the_normalised_moment() -> None:
    method, state, moments = kfac_fx.NKFAC(decay=0.9), state_of(4, 3), {"A": spd(1, 4), "G": spd(1, 3)}
    for k in range(1, 8):
        state = folded(method, state, moments, inverse_scale=16.0)
        a, g = moments["A"][0], moments["G"][0] / 16
        share = 1 - 0.9**k
        assert torch.allclose(state["A"][0], share * a / a.norm(), rtol=1e-11, atol=0)
        assert torch.allclose(state["G"][0], share * g / g.norm(), rtol=1e-11, atol=0)


def test_groups_are_normalised_each_for_itself() -> None:
    moment = spd(3, 4) * torch.tensor([1.0, 1e3, 0.0], dtype=torch.float64)[:, None, None]
    state = {"A": torch.zeros(3, 4, 4, dtype=torch.float64)}
    norms = folded(kfac_fx.NKFAC(), state, {"A": moment})["A"].norm(dim=(1, 2))
    assert torch.allclose(norms, torch.tensor([0.05, 0.05, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e200])
def test_a_batch_that_is_not_finite_leaves_the_average(bad: float) -> None:
    method, state = kfac_fx.NKFAC(), folded(kfac_fx.NKFAC(), state_of(4, 3), {"A": spd(1, 4), "G": spd(1, 3)})
    broken = spd(1, 4)
    broken[0, 1, 1] = bad
    after = folded(method, state, {"A": broken, "G": spd(1, 3)})
    assert torch.equal(after["A"], state["A"])
    assert not torch.equal(after["G"], state["G"])


# ---------------------------------------------------------------- refresh


def test_refreshes_are_exact_three_times_and_then_every_500th(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("exact_inverse", "newton_inverse"):
        inner = getattr(nkfac, name)
        monkeypatch.setattr(
            nkfac, name, lambda *a, inner=inner, name=name, **k: (calls.append(name), inner(*a, **k))[1]
        )
    method, state = kfac_fx.NKFAC(), folded(kfac_fx.NKFAC(), state_of(2, 2), {"A": spd(1, 2), "G": spd(1, 2)})
    exact = []
    for count in (0, 1, 2, 3, 4, 499, 500, 501, 999, 1000):
        calls.clear()
        method.refresh({"layer": state}, counts={"layer": count})
        exact += [count] if calls == ["exact_inverse"] else []
    assert exact == [0, 1, 2, 500, 1000]
    method = kfac_fx.NKFAC(statistics_every=3, inverse_every=2, exact_every=10)
    step = kfac_fx.compile(nn.Linear(2, 2), F.cross_entropy, method=method, backend="eager")
    exact = []
    for t in range(45):
        calls.clear()
        step(torch.randn(3, 2), torch.randint(2, (3,)))
        assert bool(calls) == (t % 2 == 0)
        exact += [t] if "exact_inverse" in calls else []
    assert exact == [0, 2, 4, 20, 40]


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("guard", ["frobenius", "spectral"])
def test_what_a_refresh_computes_is_not_read_on_the_host(count: int, guard: str) -> None:
    states = {
        "one": state_of(4, 3, device="meta"),
        "two": state_of(4, 4, device="meta"),
        "table": {**state_of(4, 3, device="meta"), "A": torch.empty(9, device="meta")},
    }
    new, refreshed = kfac_fx.NKFAC(guard=guard).refresh(states, counts=dict.fromkeys(states, count))
    assert new["table"]["A_inverse"].shape == (9,) and new["two"]["G_inverse"].shape == (1, 4, 4)
    assert isinstance(refreshed.kept_last, Tensor) and refreshed.kept_last.is_meta


@pytest.mark.parametrize("count", [0, 3])
def test_a_factor_that_is_not_finite_keeps_its_inverse_and_is_counted(count: int) -> None:
    states = {"bad": state_of(4, 4), "good": state_of(4, 4)}
    for state in states.values():
        state.update(folded(kfac_fx.NKFAC(), state, {"A": spd(1, 4), "G": spd(1, 4)}))
    states["bad"]["G"] = states["bad"]["G"] * torch.nan
    new, refreshed = kfac_fx.NKFAC().refresh(states, counts={"bad": count, "good": count})
    assert int(refreshed.kept_last) == 1
    assert torch.equal(new["bad"]["G_inverse"], states["bad"]["G_inverse"])
    assert all(bool(t.isfinite().all()) for state in new.values() for t in state.values())


def test_a_zero_factor_is_inverted_at_the_damping_floor() -> None:
    new, refreshed = kfac_fx.NKFAC().refresh({"layer": state_of(3, 2)}, counts={"layer": 0})
    assert torch.allclose(new["layer"]["A_inverse"][0], 1e4 * torch.eye(3, dtype=torch.float64))
    assert int(refreshed.kept_last) == 0


def test_without_damping_and_lengths_the_step_solves_linear_regression() -> None:
    inputs, targets, weight = normal(20, 4), normal(20, 3), normal(3, 4)
    residuals = inputs @ weight.T - targets
    gradient = 2 * residuals.T @ inputs / residuals.numel()
    scale = 2 / residuals.numel()  # R_: the loss is scale times the sum of half squares
    a, g = inputs.T @ inputs / 20, 20 * scale * torch.eye(3, dtype=torch.float64)  # type-2 factors
    method = kfac_fx.NKFAC(damping=0.0, damping_floor=0.0)
    state = folded(method, state_of(4, 3), {"A": a[None], "G": g[None]}, inverse_scale=1 / scale)
    new, _ = method.refresh({"layer": state}, counts={"layer": 0})
    direction = method.precondition({**state, **new["layer"]}, gradient[None])[0]
    share = 0.05  # of the new batch in both averages
    direction = direction * (share / a.norm()) * (share / g.norm())
    solution = torch.linalg.lstsq(inputs, targets).solution.T
    assert float((weight - direction - solution).norm() / solution.norm()) < 1e-8


# ---------------------------------------------------------------- lengths


def test_directions_have_the_gradients_length_whatever_the_scale_of_the_inverses() -> None:
    method, gradients = kfac_fx.NKFAC(), [normal(1, 3, 4), normal(2, 5, 6)]
    inverses = [(spd(1, 3), spd(1, 4)), (spd(2, 5), spd(2, 6))]

    def run(scale: float) -> list[Tensor]:
        raw = [
            method.precondition({"G_inverse": scale * g, "A_inverse": 3 * scale * a}, v)
            for (g, a), v in zip(inverses, gradients, strict=True)
        ]
        assert float(raw[0].norm() / gradients[0].norm()) != pytest.approx(1, abs=1e-3)
        return method.rescale(raw, gradients, learning_rates=torch.ones(2))

    for once, scaled, gradient in zip(run(1.0), run(50.0), gradients, strict=True):
        assert float(once.norm() / gradient.norm()) == pytest.approx(1, rel=1e-12)
        assert torch.allclose(once, scaled, rtol=1e-10, atol=0)
