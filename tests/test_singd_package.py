"""SINGD and IKFAC step by step against the published package, singd 0.0.5, in float64.

Conversions, taken from its source. It puts the square root of the number of loss terms into g: its
`loss_average="batch"` is a mean over examples, None a sum; this library finds that out as the factor 1/R of
the loss. A mean squared error is a mean over examples AND classes of squares without a half: it is 2 / (N C)
times the sum of the terms 1/2 |f - y|^2, so that this library's G is C/2 times the package's. The package
gets that G from the loss times sqrt(C/2), and the same steps from lr / sqrt(C/2) and weight_decay *
sqrt(C/2). Its optimizer includes momentum and weight decay, here those of torch.optim.SGD. Grouped
convolutions differ on purpose (it averages the inputs of the groups) and are not compared.
"""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fx
from tests.oracles import relative_error

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from singd.optim.optimizer import SINGD as Published

STEPS, TOLERANCE, CLASSES = 24, 1e-10, 3
SETTINGS = {"lr_cov": 0.05, "damping": 0.02}
OPTIMIZER = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01}


class Sequence(nn.Module):
    """Linear layers over positions, then the mean over positions and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.Tanh())
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, CLASSES)
    )


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 3, (2, 3), padding=(0, 1), dilation=(2, 1), bias=False),
        nn.Tanh(),
        nn.Conv2d(3, 4, 1),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


MODELS = {"mlp": (mlp, (4,)), "conv net": (conv_net, (2, 7, 7)), "sequence": (Sequence, (5, 4))}


def largest_errors(
    model_name: str,
    *,
    kfac_like: bool,
    sharing: str = "expand",
    normalize: bool = False,
    reduction: str = "mean",
    every: int = 1,
    squared: bool = False,
    ratio: float = 1.0,
) -> dict[str, float]:
    """Largest relative distance of roots, momenta and weights at any of the steps.

    squared: mean squared error instead of cross-entropy. ratio: of this library's G and the package's.
    """
    build, shape = MODELS[model_name]
    torch.manual_seed(0)
    ours = build().double()
    theirs = copy.deepcopy(ours)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        if squared:
            return F.mse_loss(outputs, targets, reduction=reduction)
        return F.cross_entropy(outputs, targets, reduction=reduction)

    scale = 1.0 if reduction == "mean" else 0.1
    optimizer = {**OPTIMIZER, "lr": OPTIMIZER["lr"] * scale}
    shared: dict[str, Any] = {**SETTINGS, "normalize_lr_cov": normalize}
    method = (kfac_fx.IKFAC if kfac_like else kfac_fx.SINGD)(statistics_every=every, **shared)
    step = kfac_fx.compile(
        ours,
        loss_fn,
        method=method,
        optimizer=torch.optim.SGD(ours.parameters(), **optimizer),
        sharing=sharing,  # type: ignore[arg-type]
        backend="eager",
    )
    root = ratio**0.5
    converted = {
        "lr": optimizer["lr"] / root,
        "momentum": optimizer["momentum"],
        "weight_decay": optimizer["weight_decay"] * root,
    }
    published = Published(
        theirs,
        T=every,
        alpha1=0.0 if kfac_like else method.alpha1,
        kfac_like=kfac_like,
        kfac_approx=sharing,
        loss_average="batch" if reduction == "mean" else None,
        structures=("dense", "dense"),
        preconditioner_dtype=(torch.float64, torch.float64),
        **converted,
        **shared,
    )
    worst: dict[str, float] = {}
    for _ in range(STEPS):
        x, y = 2 * torch.randn(6, *shape, dtype=torch.float64), torch.randint(CLASSES, (6,))
        y = torch.randn(6, CLASSES, dtype=torch.float64) if squared else y
        step(x, y)
        published.zero_grad()
        (root * loss_fn(theirs(x), y)).backward()
        published.step()
        for kind, error in errors(step, published, ours, theirs).items():
            worst[kind] = max(worst.get(kind, 0.0), error)
    return worst


def errors(
    step: kfac_fx.TrainStep, published: Published, ours: nn.Module, theirs: nn.Module
) -> dict[str, float]:
    """Largest relative distance now, of K, C, their momenta and the weights."""
    found: dict[str, float] = {}
    curvature = step.state_dict()["curvature"]
    assert set(curvature) == {f"{name}.weight" for name in published.Ks}
    stored = {
        "A_root": published.Ks,
        "G_root": published.Cs,
        "A_momentum": published.m_Ks,
        "G_momentum": published.m_Cs,
    }
    for kind, matrices in stored.items():
        for layer, matrix in matrices.items():
            error = relative_error(curvature[f"{layer}.weight"][kind][0], matrix.to_dense())
            found[kind] = max(found.get(kind, 0.0), error)
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    found["weights"] = max(relative_error(a.detach(), b.detach()) for a, b in pairs)
    return found


@pytest.mark.parametrize("normalize", [False, True], ids=["fixed step", "normalised step"])
@pytest.mark.parametrize("kfac_like", [False, True], ids=["singd", "ikfac"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("model_name", MODELS)
def test_every_step_equals_that_of_the_package(
    model_name: str, sharing: str, kfac_like: bool, normalize: bool
) -> None:
    worst = largest_errors(model_name, kfac_like=kfac_like, sharing=sharing, normalize=normalize)
    momenta = set() if kfac_like else {"A_momentum", "G_momentum"}
    assert set(worst) == {"A_root", "G_root", "weights"} | momenta
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("kfac_like", [False, True], ids=["singd", "ikfac"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_rare_updates_and_summed_losses_equal_those_of_the_package(reduction: str, kfac_like: bool) -> None:
    worst = largest_errors("conv net", kfac_like=kfac_like, reduction=reduction, every=4)
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("kfac_like", [False, True], ids=["singd", "ikfac"])
@pytest.mark.parametrize("model_name", MODELS)
def test_steps_of_a_squared_error_equal_those_of_the_package_after_the_conversion(
    model_name: str, kfac_like: bool
) -> None:
    worst = largest_errors(model_name, kfac_like=kfac_like, squared=True, ratio=CLASSES / 2)
    assert max(worst.values()) < TOLERANCE, worst
    unconverted = largest_errors(model_name, kfac_like=kfac_like, squared=True)
    assert unconverted["G_root"] > 1e-3


def test_the_comparison_sees_another_method() -> None:
    """The negative control: IKFAC is not SINGD without Riemannian momentum, for the traces still weigh."""
    torch.manual_seed(0)
    ours = mlp().double()
    theirs, ends = copy.deepcopy(ours), []
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(CLASSES, (6,))
    for model, method in ((ours, kfac_fx.SINGD(alpha1=0.0, **SETTINGS)), (theirs, kfac_fx.IKFAC(**SETTINGS))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step = kfac_fx.compile(model, F.cross_entropy, method=method, optimizer=optimizer, backend="eager")
        step(x, y)
        ends.append(step.state_dict()["curvature"]["0.weight"]["A_root"])
    assert relative_error(*ends) > 1e-3
