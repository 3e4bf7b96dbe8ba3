"""Levenberg-Marquardt damping against a transcription in plain PyTorch, resumption, and a training run."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import kfac_fx
from tests.plain_kfac import RATE, PlainKFAC, batches, compiled, network
from tests.training import differing, run_step, snapshot

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

ADAPT_EVERY = 2


@pytest.fixture(autouse=True)
def double_precision() -> object:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("damping", "rate"), [(150.0, RATE), (1e-3, RATE), (0.02, 0.5)], ids=["paper", "small", "fast"]
)
def test_damping_ratio_and_weights_equal_the_transcription_over_20_steps(damping: float, rate: float) -> None:
    plain = PlainKFAC(network(), damping=damping, l2=1e-3, rate=rate)
    model = network()
    step = compiled(model, damping=damping, l2=1e-3, adapt_rate=rate)
    lams, ratios = [], []
    for index, (x, y) in enumerate(batches(20)):
        plain.step(x, y)
        step(x, y)
        lams.append(step.damping)
        if (index + 1) % ADAPT_EVERY == 0:
            ratios.append(step.reduction_ratio)
        theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        assert (theta - plain.theta()).norm() < 1e-8 * theta.norm()
    assert lams == pytest.approx(plain.lams, rel=1e-12)
    assert ratios == pytest.approx(plain.ratios, rel=1e-5)
    assert lams[-1] != damping


def test_the_trajectories_of_the_test_above_raise_and_lower_the_damping() -> None:
    """Otherwise one branch of the rule would be compared with nothing."""
    for damping, rises in ((150.0, False), (1e-3, True)):
        plain = PlainKFAC(network(), damping=damping, l2=1e-3)
        for x, y in batches(20):
            plain.step(x, y)
        steps = [b / a for a, b in zip(plain.lams, plain.lams[1:], strict=False)]
        assert any(s > 1 for s in steps) if rises else any(s < 1 for s in steps)


def test_the_damping_stays_within_its_bounds() -> None:
    step = compiled(network(), damping=1.0, adapt_rate=0.5, damping_bounds=(0.9, 2.0))
    run_step(step, batches(4))
    assert step.damping == 0.9


def test_without_adaptation_the_damping_is_the_setting() -> None:
    step = compiled(network(), damping=1.0, adaptive_damping=False)
    run_step(step, batches(4))
    assert step.damping == 1.0 and step.reduction_ratio is None
    assert kfac_fx.compile(network(), method=kfac_fx.KFAC(damping=0.25)).damping == 0.25
    with pytest.raises(kfac_fx.KfacFxError, match="no damping"):
        _ = kfac_fx.compile(network(), method="singd").damping


def test_the_inverses_follow_the_adapted_damping() -> None:
    step = compiled(network(), damping=1.0, adapt_rate=0.5, l2=0.5)
    run_step(step, batches(3))
    assert step.damping < 1.0  # adapted after the second step; the fourth refreshes
    lam = step.damping + 0.5
    run_step(step, batches(1))
    for factors in step.state_dict()["curvature"].values():
        a, g = factors["A"][0], factors["G"][0]
        pi = math.sqrt(float(a.trace() / len(a)) / float(g.trace() / len(g)))
        expected = (a + pi * math.sqrt(lam) * torch.eye(len(a))).inverse()
        assert torch.allclose(factors["A_inverse"][0], expected, rtol=1e-9)


def test_resuming_is_bit_identical() -> None:
    data = batches(14)
    model = network()
    step = compiled(model, damping=0.5, l2=1e-3)
    run_step(step, data[:7])
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "step": step.state_dict()}, saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    twin = network()
    twin.load_state_dict(state["model"])
    other = compiled(twin, damping=0.5, l2=1e-3)
    other.load_state_dict(state["step"])
    assert torch.equal(torch.stack(run_step(step, data[7:])), torch.stack(run_step(other, data[7:])))
    assert differing(snapshot(model, step), snapshot(twin, other)) == []


def test_a_state_that_does_not_fit_is_refused_and_nothing_changes() -> None:
    step = compiled(network(), damping=0.5)
    run_step(step, batches(3))
    good = step.state_dict()
    before = snapshot(step.model, step)
    bad = copy.deepcopy(good)
    bad["quadratic"]["last_update"]["0.weight"] = torch.zeros(2)
    plain = {key: value for key, value in good.items() if key != "quadratic"}
    for state, message in ((plain, "no quadratic model"), (bad, "last update of 0.weight")):
        with pytest.raises(kfac_fx.errors.StateError, match=message):
            step.load_state_dict(state)
        assert differing(before, snapshot(step.model, step)) == []


def test_an_error_during_the_update_restores_damping_and_last_update() -> None:
    step = compiled(network(), damping=0.5, adapt_every=1)
    data = batches(5)
    run_step(step, data[:4])
    before = snapshot(step.model, step)

    def fail(*_: object) -> None:
        raise RuntimeError("out of disk")

    handle = step.optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of disk"):
        step(*data[4])
    assert differing(before, snapshot(step.model, step)) == []
    handle.remove()
    run_step(step, data[4:])
    assert differing(before, snapshot(step.model, step)) != []


def autoencoder_loss(*, adaptive: bool) -> float:
    """Loss after 60 steps from damping 150 on images of 64 pixels made of 8 patterns."""
    torch.manual_seed(2)
    patterns, strength = torch.randn(8, 64), torch.rand(256, 8)
    images = torch.sigmoid(strength @ patterns + 0.1 * torch.randn(256, 64))
    model = nn.Sequential(
        nn.Linear(64, 30), nn.Tanh(), nn.Linear(30, 8), nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, 64)
    )
    method = kfac_fx.KFAC(damping=150.0, quadratic_model=True, adaptive_damping=adaptive, l2=1e-5)
    loss_fn = nn.BCEWithLogitsLoss(reduction="sum")
    step = kfac_fx.compile(
        model, lambda f, y: loss_fn(f, y) / len(y), method=method, fisher="mc", backend="eager"
    )
    torch.manual_seed(3)
    return float([step(images, images) for _ in range(60)][-1])


def test_an_autoencoder_trains_further_with_adapted_damping_than_with_fixed() -> None:
    adapted, fixed = autoencoder_loss(adaptive=True), autoencoder_loss(adaptive=False)
    assert adapted < fixed - 0.3
