"""NKFAC and AdaNKFAC step by step against a plain transcription of the published formulas (`plain_nkfac`)."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fx
from kfac_fx.contracts import Method

from .plain_nkfac import PlainNKFAC

TOLERANCE = 1e-11
STEPS = 30
SCHEDULE = {"statistics_every": 2, "inverse_every": 3}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 5, 3, stride=2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(20, 3),
    ).double()


def batches(loss: str) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    pairs = []
    for _ in range(STEPS):
        x = torch.randn(8, 2, 6, 6, dtype=torch.float64)
        y = torch.randint(3, (8,)) if loss == "cross_entropy" else torch.randn(8, 3, dtype=torch.float64)
        pairs.append((x, y))
    return pairs


@dataclass
class Run:
    """Library and transcription on copies of one model; `gradients` is what the optimizer last received."""

    step: kfac_fx.TrainStep
    plain: PlainNKFAC
    gradients: dict[str, Tensor]

    def differences(self) -> dict[str, float]:
        """Largest relative difference over the layers of everything that a step computes."""
        curvature, found = self.step.state_dict()["curvature"], {}
        weights = dict(self.step.model.named_parameters())
        theirs = dict(self.plain.model.named_parameters())
        for name, record in self.plain.records.items():
            state = curvature[f"{name}.weight"]
            biased = f"{name}.bias" in weights
            pairs = {
                "A": (state["A"][0], record.m_A),
                "G": (state["G"][0], record.m_G),
                "A_inverse": (state["A_inverse"][0], record.D_A),
                "G_inverse": (state["G_inverse"][0], record.D_G),
                "direction": (joined(self.gradients, name, biased=biased), record.direction),
                "weights": (joined(weights, name, biased=biased), joined(theirs, name, biased=biased)),
            }
            for what, (ours, expected) in pairs.items():
                error = float((ours - expected).detach().norm() / expected.detach().norm())
                found[what] = max(found.get(what, 0.0), error)
        return found


def joined(tensors: dict[str, Tensor], name: str, *, biased: bool) -> Tensor:
    weight = tensors[f"{name}.weight"].flatten(1)
    return torch.cat([weight, tensors[f"{name}.bias"][:, None]], 1) if biased else weight


def start(method: Method, plain: PlainNKFAC) -> Run:
    """The library on another copy of the transcription's model."""
    twin = network()
    step = kfac_fx.compile(twin, plain.loss_fn, method=method, backend="eager")
    gradients: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        gradients.update({name: p.grad.clone() for name, p in twin.named_parameters() if p.grad is not None})

    step.optimizer.register_step_pre_hook(keep)
    return Run(step, plain, gradients)


def worst(run: Run, loss: str) -> dict[str, float]:
    """Largest difference of each quantity over all steps."""
    found: dict[str, float] = {}
    for x, y in batches(loss):
        ours, theirs = run.step(x, y), run.plain.step(x, y)
        now = {**run.differences(), "loss": abs(float(ours - theirs)) / float(theirs)}
        found = {what: max(error, found.get(what, 0.0)) for what, error in now.items()}
    return found


@pytest.mark.parametrize("loss", ["cross_entropy", "mse_loss"])
@pytest.mark.parametrize(("exact_every", "newton_steps"), [(500, 1), (4, 1), (500, 3)])
def test_nkfac_equals_the_plain_transcription_at_every_step(
    loss: str, exact_every: int, newton_steps: int
) -> None:
    settings = {**SCHEDULE, "exact_every": exact_every, "newton_steps": newton_steps}
    plain = PlainNKFAC(network(), getattr(F, loss), **settings)
    errors = worst(start(kfac_fx.NKFAC(**settings), plain), loss)
    assert max(errors.values()) < TOLERANCE, errors
    residuals = [r for record in plain.records.values() for r in record.residuals]
    assert min(residuals) < 1 < max(residuals), "both branches of the safeguard are to be compared"


@pytest.mark.parametrize("loss", ["cross_entropy", "mse_loss"])
def test_adankfac_equals_the_plain_transcription_at_every_step(loss: str) -> None:
    settings = {**SCHEDULE, "exact_every": 4}
    plain = PlainNKFAC(network(), getattr(F, loss), adam=True, lr=1e-3, **settings)
    errors = worst(start(kfac_fx.AdaNKFAC(**settings), plain), loss)
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("without", ["safeguard", "recovery", "robust_start"])
def test_a_transcription_without_one_of_the_parts_differs(without: str) -> None:
    plain = PlainNKFAC(network(), F.cross_entropy, **SCHEDULE, **{without: False})
    errors = worst(start(kfac_fx.NKFAC(**SCHEDULE), plain), "cross_entropy")
    assert not max(errors["G_inverse"], errors["direction"]) < 1e-6, errors
