"""NKFAC and AdaNKFAC as methods of the library: settings, refusals, accumulation, resuming; oracle I6."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fx
from kfac_fx.methods import nkfac

from . import training

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")


def normal(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64)


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 3)
    ).double()


def compiled(model: nn.Module, loss_fn: Any = F.cross_entropy, **options: Any) -> kfac_fx.TrainStep:
    method = options.pop("method", kfac_fx.NKFAC(statistics_every=1, inverse_every=2))
    return kfac_fx.compile(model, loss_fn, method=method, **{"backend": "eager", **options})


def test_norms_are_left_to_the_optimizer_with_a_reason() -> None:
    x, y = torch.randn(4, 2, 6, 6), torch.randint(3, (4,))
    for method, name in (("nkfac", "nkfac"), ("adankfac", "adankfac")):
        plan = kfac_fx.inspect(small_network().float(), F.cross_entropy, x, y, method=method)
        assert {s.parameter: s.reason for s in plan.skipped} == {
            "3.weight": kfac_fx.Reason.METHOD,
            "3.bias": kfac_fx.Reason.METHOD,
        }
        assert all(s.detail.startswith(f"{name}, as published, leaves") for s in plan.skipped)


def test_the_published_settings_are_the_defaults() -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    method, other = kfac_fx.NKFAC(), kfac_fx.AdaNKFAC()
    assert (method.statistics_every, method.inverse_every, method.decay, method.damping) == (
        20,
        200,
        0.95,
        0.01,
    )
    assert (other.statistics_every, other.inverse_every, other.decay, other.damping) == (
        100,
        1000,
        0.95,
        0.01,
    )
    group = method.base_optimizer(parameters).param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.05, 0.9, 1e-3)
    adam = other.base_optimizer(parameters)
    assert isinstance(adam, torch.optim.AdamW)
    assert (adam.param_groups[0]["betas"], adam.param_groups[0]["weight_decay"]) == ((0.9, 0.999), 0.0)


@pytest.mark.parametrize(
    "setting",
    [
        {"decay": 1.0},
        {"damping": -0.1},
        {"damping_floor": -1e-4},
        {"damping_floor": float("inf")},
        {"newton_steps": 0},
        {"exact_every": 0},
        {"inverse_every": 0},
        {"guard": "nuclear"},
    ],
)
def test_a_setting_without_meaning_is_refused_by_name(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=rf"NKFAC\({name}="):
        kfac_fx.NKFAC(**setting)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_unequal_parts_accumulate_to_the_whole_batch(reduction: str) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction=reduction)

    whole, parts = compiled(small_network(), loss), compiled(small_network(), loss)
    for _ in range(3):
        x, y = normal(7, 2, 6, 6), torch.randint(3, (7,))
        whole(x, y)
        parts.accumulate(x[:5], y[:5])
        parts.accumulate(x[5:], y[5:])
        parts.update()
    assert training.distance(training.snapshot(whole.model), training.snapshot(parts.model)) < 1e-10
    assert (
        training.distance(training.snapshot(whole.model, whole), training.snapshot(parts.model, parts)) < 1e-8
    )


@pytest.mark.parametrize("name", ["nkfac", "adankfac"])
def test_a_resumed_run_is_the_same_bit_for_bit(name: str) -> None:
    cls = {"nkfac": kfac_fx.NKFAC, "adankfac": kfac_fx.AdaNKFAC}[name]
    method = cls(statistics_every=2, inverse_every=3)
    batches = [(normal(n, 2, 6, 6), torch.randint(3, (n,))) for n in (6, 6, 4) * 5]
    whole = compiled(small_network(), method=method)
    for x, y in batches[:11]:
        whole(x, y)
    saved = copy.deepcopy((whole.model.state_dict(), whole.state_dict()))
    resumed = compiled(small_network(), method=method)
    resumed.model.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for x, y in batches[11:]:
        assert torch.equal(whole(x, y), resumed(x, y))
    ours, theirs = training.snapshot(whole.model, whole), training.snapshot(resumed.model, resumed)
    assert training.differing(ours, theirs) == []


def test_a_failed_step_restores_the_count_of_kept_inverses(monkeypatch: pytest.MonkeyPatch) -> None:
    step = compiled(nn.Linear(3, 2).double(), method=kfac_fx.NKFAC(statistics_every=1, inverse_every=1))
    x, y = normal(4, 3), torch.randint(2, (4,))
    monkeypatch.setattr(nkfac, "symmetrised", lambda m: m * torch.nan)
    for _ in range(2):
        step(x, y)
    assert step.counts["kept_last"] == 4

    def fails() -> None:
        raise RuntimeError("no update")

    monkeypatch.setattr(step.optimizer, "step", fails)
    with pytest.raises(RuntimeError, match="no update"):
        step(x, y)
    assert step.counts["kept_last"] == 4


def directions(scale: float, method: Any) -> list[Tensor]:
    """What the optimizer receives in five steps at rate zero, of a loss times `scale`."""
    model = small_network()
    torch.manual_seed(1)
    batches = [(normal(6, 2, 6, 6), torch.randint(3, (6,))) for _ in range(5)]
    step = compiled(
        model,
        lambda outputs, targets: scale * F.cross_entropy(outputs, targets, reduction="sum"),
        method=method,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
    )
    found: list[Tensor] = []
    step.optimizer.register_step_pre_hook(
        lambda *_: found.extend(p.grad.clone() for p in model.parameters() if p.grad is not None)
    )
    for x, y in batches:
        step(x, y)
    return found


def test_a_loss_times_a_constant_gives_directions_times_that_constant() -> None:
    method = kfac_fx.NKFAC(statistics_every=1, inverse_every=1)
    for once, scaled in zip(directions(1.0, method), directions(37.0, method), strict=True):
        assert float((scaled - 37 * once).norm() / scaled.norm()) < 1e-10
    other = kfac_fx.KFAC(inverse_every=1)
    ratios = [
        float((scaled - 37 * once).norm() / scaled.norm())
        for once, scaled in zip(directions(1.0, other), directions(37.0, other), strict=True)
    ]
    assert max(ratios) > 1e-2
