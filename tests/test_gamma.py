"""The strength gamma of the factored damping, adapted apart from lambda (Martens & Grosse 2015, section 6.6).

The reference is the dense transcription of `tests/plain_kfac.py`.
"""

import copy
import functools
import io
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fx
from kfac_fx.curvature import Curvature
from kfac_fx.forward import Forward
from kfac_fx.types import Refreshed, State
from tests.plain_kfac import RATE, PlainKFAC, batches, compiled, network
from tests.training import differing, run_step, snapshot

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

TOLERANCE = 1e-10
ETA, STEPS, EVERY = 1e-3, 50, 5
SCHEDULE = {"adapt_every": EVERY, "gamma_every": EVERY}
# damping, adapt_rate, inverse_every
CASES = {
    "paper": (150.0, RATE, 5),
    "balanced": (0.1, RATE, 5),
    "fast": (150.0, 0.7, 5),
    "often": (1.0, RATE, 1),
}


@pytest.fixture(autouse=True)
def double_precision() -> object:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@functools.cache
def plain(case: str, kind: type[PlainKFAC] = PlainKFAC) -> PlainKFAC:
    """After all steps. Nothing steps it further."""
    damping, rate, inverse_every = CASES[case]
    reference = kind(network(), damping=damping, l2=ETA, rate=rate, inverse_every=inverse_every, **SCHEDULE)
    for x, y in batches(STEPS):
        reference.step(x, y)
    return reference


def adaptive(model: nn.Module, case: str = "balanced", **settings: object) -> kfac_fx.TrainStep:
    damping, rate, inverse_every = CASES[case]
    chosen = {"damping": damping, "l2": ETA, "adapt_rate": rate, "inverse_every": inverse_every}
    return compiled(model, **{**chosen, **SCHEDULE, "adaptive_gamma": True, **settings})


def theta(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def changes(gammas: list[float]) -> set[int]:
    """Of each choice: up (1), down (-1) or as it was (0)."""
    choices = zip(gammas[EVERY - 1 :: EVERY], gammas[EVERY::EVERY], strict=False)
    return {(b > a) - (b < a) for a, b in choices}


@pytest.mark.parametrize("case", CASES)
def test_gammas_lambdas_and_weights_equal_the_transcription_over_50_steps(case: str) -> None:
    reference, model = plain(case), network()
    step = adaptive(model, case)
    assert step.gamma == pytest.approx(math.sqrt(CASES[case][0] + ETA), rel=1e-15)
    gammas, lams = [], []
    for x, y in batches(STEPS):
        step(x, y)
        gammas.append(step.gamma)
        lams.append(step.damping)
    assert gammas == pytest.approx(reference.gammas, rel=1e-12)
    assert lams == pytest.approx(reference.lams, rel=1e-12)
    assert (theta(model) - reference.theta()).norm() < TOLERANCE * theta(model).norm()


def test_the_trajectories_of_the_test_above_raise_lower_and_keep_gamma() -> None:
    """Otherwise one candidate would be compared with nothing."""
    gammas = {case: plain(case).gammas for case in CASES}
    assert set().union(*(changes(found) for found in gammas.values())) == {-1, 0, 1}
    for found in gammas.values():
        assert all(a == b for i, (a, b) in enumerate(zip(found, found[1:], strict=False), 1) if i % EVERY)


def test_always_keeping_the_present_gamma_gives_other_weights() -> None:
    class Keeping(PlainKFAC):
        def choice(self, gammas: list[float], falls: list[float]) -> int:
            return 0

    model = network()
    run_step(adaptive(model), batches(STEPS))
    assert (theta(model) - plain("balanced", Keeping).theta()).norm() > 1e-2 * theta(model).norm()


def test_a_candidate_whose_inverses_could_not_be_renewed_is_not_chosen() -> None:
    least = CASES["balanced"][0] * (1 - 1e-9)

    class Failing(kfac_fx.KFAC):
        def refresh(
            self, states: Mapping[str, State], *, counts: Mapping[str, int]
        ) -> tuple[dict[str, State], Refreshed]:
            if self.damping < least:
                return {}, Refreshed(retried=0, kept_last=1)
            return super().refresh(states, counts=counts)

    class Bounded(PlainKFAC):
        def choice(self, gammas: list[float], falls: list[float]) -> int:
            return min(range(len(falls)), key=lambda i: (gammas[i] ** 2 < least, falls[i]))

    model = network()
    method = Failing(**vars(adaptive(model).method))
    step = kfac_fx.compile(model, F.cross_entropy, method=method, fisher="type2", backend="eager")
    run_step(step, batches(STEPS))
    reference = plain("balanced", Bounded)
    assert step.gamma == pytest.approx(reference.gammas[-1], rel=1e-12)
    assert (theta(model) - reference.theta()).norm() < TOLERANCE * theta(model).norm()
    assert step.counts["kept_last"] == 0
    assert min(plain("balanced").gammas) ** 2 < least  # such candidates would be chosen


def test_a_choice_refreshes_and_differentiates_once_per_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, run)

    for owner, name in ((Curvature, "refresh"), (Curvature, "preconditioned"), (Forward, "derivative")):
        counted(owner, name)
    step = adaptive(network(), inverse_every=1)
    found = []
    for x, y in batches(6):
        calls.clear()
        step(x, y)
        found.append(tuple(calls.count(name) for name in ("refresh", "preconditioned", "derivative")))
    assert found[0] == (1, 1, 1)
    assert found[1:5] == [(1, 1, 2)] * 4  # the second derivative is along the last update
    assert found[5] == (3, 3, 4)


def test_inverses_and_blocks_are_those_of_the_chosen_gamma() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
    step = adaptive(model, damping=1.0)
    run_step(step, batches(EVERY + 1))
    gamma, state = step.gamma, step.state_dict()["curvature"]
    assert gamma is not None and gamma != math.sqrt(1.0 + ETA) and gamma**2 != step.damping + ETA
    for factors in state.values():
        if "F" in factors:
            expected = (factors["F"] + gamma**2 * torch.eye(2)).inverse()
            assert torch.allclose(factors["F_inverse"], expected, rtol=1e-9)
            continue
        a, g = factors["A"][0], factors["G"][0]
        pi = math.sqrt(float(a.trace() / len(a)) / float(g.trace() / len(g)))
        assert torch.allclose(
            factors["A_inverse"][0], (a + pi * gamma * torch.eye(len(a))).inverse(), rtol=1e-9
        )
        assert torch.allclose(
            factors["G_inverse"][0], (g + gamma / pi * torch.eye(len(g))).inverse(), rtol=1e-9
        )
    assert any("F" in factors for factors in state.values())


def test_gamma_squared_stays_within_the_bounds_of_the_damping() -> None:
    step = adaptive(network(), "paper", damping_bounds=(1e-8, 160.0))
    run_step(step, batches(2 * EVERY + 1))
    assert step.gamma == pytest.approx(math.sqrt(160.0), rel=1e-15)


def test_without_adaptation_gamma_follows_lambda() -> None:
    step = adaptive(network(), adaptive_gamma=False)
    run_step(step, batches(EVERY + 1))
    assert step.gamma is None and "gamma_squared" not in step.state_dict()["quadratic"]
    assert kfac_fx.compile(network(), method="kfac").gamma is None


def test_kfc_has_the_same_option() -> None:
    gammas: dict[str, list[float | None]] = {"kfac": [], "kfc": []}
    for name, kind in (("kfac", kfac_fx.KFAC), ("kfc", kfac_fx.KFC)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3))
        method = kind(damping=1.0, quadratic_model=True, adaptive_gamma=True, inverse_every=2, gamma_every=2)
        step = kfac_fx.compile(model, F.cross_entropy, method=method, backend="eager")
        for _ in range(6):
            step(torch.randn(8, 2, 5, 5), torch.randint(3, (8,)))
            gammas[name].append(step.gamma)
    assert gammas["kfac"] == pytest.approx(gammas["kfc"], rel=1e-12)
    assert len(set(gammas["kfac"])) > 1


@pytest.mark.parametrize("before", [EVERY - 1, EVERY, EVERY + 2])
def test_resuming_is_bit_identical(before: int) -> None:
    data, model = batches(4 * EVERY), network()
    step = adaptive(model)
    run_step(step, data[:before])
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "step": step.state_dict()}, saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    twin = network()
    twin.load_state_dict(state["model"])
    other = adaptive(twin)
    other.load_state_dict(state["step"])
    assert other.gamma == step.gamma
    assert torch.equal(
        torch.stack(run_step(step, data[before:])), torch.stack(run_step(other, data[before:]))
    )
    assert differing(snapshot(model, step), snapshot(twin, other)) == []
    assert step.gamma == other.gamma != adaptive(network()).gamma


def test_a_state_without_gamma_is_refused_and_nothing_changes() -> None:
    step = adaptive(network())
    run_step(step, batches(EVERY + 1))
    without = copy.deepcopy(step.state_dict())
    del without["quadratic"]["gamma_squared"]
    before, gamma = snapshot(step.model, step), step.gamma
    with pytest.raises(kfac_fx.errors.StateError, match="no gamma.*adaptive_gamma=False"):
        step.load_state_dict(without)
    assert differing(before, snapshot(step.model, step)) == [] and step.gamma == gamma


def test_an_error_after_the_choice_restores_gamma_and_inverses() -> None:
    data = batches(EVERY + 1)
    step = adaptive(network())
    run_step(step, data[:EVERY])
    before, gamma = snapshot(step.model, step), step.gamma

    def fail(*_: object) -> None:
        raise RuntimeError("out of disk")

    handle = step.optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of disk"):
        step(*data[EVERY])
    assert differing(before, snapshot(step.model, step)) == [] and step.gamma == gamma
    handle.remove()
    step(*data[EVERY])
    assert step.gamma != gamma


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quadratic_model": False}, "adaptive_gamma=True.*needs quadratic_model=True"),
        ({"damping_rule": "tikhonov"}, "damping_rule='tikhonov'.*adaptive_gamma=True needs \"factored\""),
        ({"damping_rule": "sqrt"}, "damping_rule='sqrt'.*adaptive_gamma=True needs \"factored\""),
        ({"inverse_every": 3}, "gamma_every=20.*needs a multiple of inverse_every=3"),
        ({"gamma_every": 0}, "gamma_every=0.*at least 1"),
        ({"damping": 0.0}, "damping=0.0.*positive with"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, object], message: str) -> None:
    for kind in (kfac_fx.KFAC, kfac_fx.KFC):
        with pytest.raises(ValueError, match=message):
            kind(**{"quadratic_model": True, "adaptive_gamma": True, **settings})  # type: ignore[arg-type]
