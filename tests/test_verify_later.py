"""`kfac_fx.verify` runs plain, statistics and refresh steps: each defect that only they show is a violation.

Programs are spliced from functions that are traced once per setting, so each defect has a damping of its own.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import kfac_fx
from kfac_fx import directions
from kfac_fx.methods import base
from kfac_fx.methods import kfac as kfac_method
from kfac_fx.methods import nkfac as nkfac_method
from kfac_fx.verification import Verification, schedule, training
from kfac_fx_cli.main import app

_DAMPINGS = (0.01 + 1e-5 * n for n in itertools.count(1))


def verified(method: Any, **options: Any) -> Verification:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        batch = torch.randn(9, 6), torch.randint(0, 3, (9,))
    return kfac_fx.verify(model, F.cross_entropy, *batch, method=method, **options)


def kfac(**settings: Any) -> kfac_fx.KFAC:
    return kfac_fx.KFAC(damping=next(_DAMPINGS), **settings)


def nkfac(**settings: Any) -> kfac_fx.NKFAC:
    return kfac_fx.NKFAC(damping=next(_DAMPINGS), **settings)


def check_only_later_steps_are_violated(found: Verification, *told: str) -> None:
    """Every layer is, at one of these places, and nothing of the first step is."""
    assert not found.ok
    assert {check.name for check in found.violations} == {"later steps"}
    for layer in found.layers:
        later = layer.checks[-1]
        assert later.status == "violated" and any(part in later.detail for part in told), later


def fold_that_forgets(self: Any, state: Any, batch: Any, **_: Any) -> Any:
    return dict(batch)


def fold_of_another_weight(self: Any, state: Any, batch: Any, *, weight: Tensor, **_: Any) -> Any:
    return {name: base.averaged(state[name], new, weight * (2 - weight)) for name, new in batch.items()}


@pytest.mark.parametrize("fold", [fold_that_forgets, fold_of_another_weight])
def test_a_wrong_moving_average_is_a_violation(monkeypatch: pytest.MonkeyPatch, fold: Any) -> None:
    monkeypatch.setattr(kfac_fx.KFAC, "fold", fold, raising=False)
    check_only_later_steps_are_violated(verified(kfac()), "A at step", "G at step")


def test_a_wrong_share_of_later_batches_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfac_fx.KFAC, "new_weight", lambda self, count: 5.0 if count else 1.0, raising=False)
    check_only_later_steps_are_violated(verified(kfac()), "A at step", "G at step")


def test_a_direction_that_ascends_in_the_graph_alone_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    original = directions.layer_function

    def negated(*args: Any) -> Callable[..., dict[str, Tensor]]:
        run = original(*args)
        return lambda *tensors: {**(found := run(*tensors)), "direction": -found["direction"]}

    monkeypatch.setattr(directions, "layer_function", negated)
    found = verified(kfac(kl_clip=None))
    check_only_later_steps_are_violated(found, "update at step 2 (plain)", "update at step 3 (statistics)")
    assert math.isclose(found.layers[0].checks[-1].error or 0.0, 2.0)


def test_a_newton_step_that_raises_is_a_violation_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nkfac_method, "newton_inverse", lambda *args, **_: 1 / 0)
    found = verified(nkfac())
    (check,) = found.violations
    assert check.name == "later steps" and check.error == math.inf
    assert "step 5 (refresh) raised ZeroDivisionError" in check.detail


@pytest.mark.parametrize("change", [lambda new, last: last, lambda new, last: new * 1.0001])
def test_a_wrong_newton_step_is_a_violation_of_the_inverse(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, Tensor], Tensor]
) -> None:
    original = nkfac_method.newton_inverse
    monkeypatch.setattr(
        nkfac_method, "newton_inverse", lambda m, last, **k: change(original(m, last, **k), last)
    )
    check_only_later_steps_are_violated(verified(nkfac()), "inverse of")


def test_a_later_refresh_with_another_damping_is_a_violation_of_the_update(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, method, calls = kfac_method.inverted, kfac(), itertools.count()

    def later_ones(sides: Any, dampings: Any, *args: Any, **options: Any) -> Any:
        factor = 1.01 if next(calls) >= 2 else 1.0  # the first two: of the step, and of the first check
        scaled = {key: tuple(d * factor for d in pair) for key, pair in dampings.items()}
        return original(sides, scaled, *args, **options)

    monkeypatch.setattr(kfac_method, "inverted", later_ones)
    check_only_later_steps_are_violated(verified(method), "update at step 5 (refresh)")
    assert next(calls) == 3


def test_a_wrong_length_is_a_violation_of_first_and_later_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    method, plain = kfac(), base.kl_clipped
    monkeypatch.setattr(base, "kl_clipped", lambda v, g, **k: [0.5 * one for one in plain(v, g, **k)])
    found = verified(method)
    assert {check.name for check in found.violations} == {"update", "later steps"}


@pytest.mark.parametrize("guard", ["frobenius", "spectral"])
@pytest.mark.parametrize("steps", [1, 3])
def test_sound_newton_steps_are_ok_or_say_why_they_are_not_checked(guard: str, steps: int) -> None:
    found = verified(nkfac(guard=guard, newton_steps=steps))
    assert found.ok
    later = [layer.checks[-1] for layer in found.layers]
    assert {c.reason for c in later} <= (
        {""} if guard == "frobenius" else {"", "the norm of this guard is an estimate"}
    )
    assert guard == "spectral" or {c.status for c in later} == {"ok"}


def test_what_is_not_covered_says_why() -> None:
    found = verified(kfac_fx.SKFAC(window=3))
    assert found.ok
    assert {v.checks[-1].reason for v in found.layers} == {
        "a window of several batches has no independent formula"
    }
    modelled = verified(kfac(quadratic_model=True))
    (reason,) = {v.checks[-1].reason for v in modelled.layers}
    assert modelled.ok and "quadratic model" in reason


def test_later_batches_have_other_examples_whole_and_in_pairs() -> None:
    inputs, targets = torch.arange(18.0).reshape(9, 2), torch.arange(9)
    plan = kfac_fx.inspect(nn.Linear(2, 9), F.cross_entropy, inputs, targets)
    batches = [training.resampled((inputs, targets), plan, n) for n in range(1, len(schedule.KINDS))]
    assert all(torch.equal(x[:, 0], 2.0 * y) and x.shape == inputs.shape for x, y in batches)
    assert len({tuple(y.tolist()) for _, y in batches}) == len(batches)


def test_the_command_ends_with_4_and_shows_the_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "small.py"
    file.write_text(
        "import torch\nfrom torch import nn\n\n\ndef build():\n    torch.manual_seed(0)\n"
        "    return nn.Linear(4, 3), nn.CrossEntropyLoss(), torch.randn(6, 4), torch.randint(0, 3, (6,))\n"
    )
    monkeypatch.setattr(kfac_fx.KFAC, "new_weight", lambda self, count: 1.0, raising=False)
    result = CliRunner().invoke(app, ["verify", str(file), "--no-color"])
    assert result.exit_code == 4
    header = next(line for line in result.stdout.splitlines() if line.startswith("layer "))
    assert "later steps" in header and "later steps (" in result.stdout and "1 VIOLATED" in result.stdout
