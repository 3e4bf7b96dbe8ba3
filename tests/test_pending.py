"""Micro-batches of images of different sizes against dense factors of all of them together."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from tests.oracles import append_one, conv_patches, relative_error

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

SIZES = ((2, 6), (3, 9), (1, 7))
METHODS: dict[str, tuple[Any, str, bool]] = {
    "kfac, expand": (kfac_fx.KFAC(), "expand", False),
    "kfac, reduce": (kfac_fx.KFAC(), "reduce", True),
    "skfac reduces, expand": (kfac_fx.SKFAC(statistics_every=1), "expand", True),
    "skfac reduces, reduce": (kfac_fx.SKFAC(statistics_every=1), "reduce", True),
    "skfac keeps all, expand": (
        kfac_fx.SKFAC(strategy="subsample", positions=99, statistics_every=1),
        "expand",
        False,
    ),
    "skfac keeps all, reduce": (
        kfac_fx.SKFAC(strategy="subsample", positions=99, statistics_every=1),
        "reduce",
        False,
    ),
}


class Pooled(nn.Module):
    """A convolution whose positions are averaged, so that images of all sizes fit."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(channels, 5, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).mean((2, 3)))


def dense_factors(
    model: Pooled, batches: list[tuple[Tensor, Tensor]], *, by_example: bool
) -> tuple[Tensor, Tensor]:
    """A and G of the convolution: means over all examples, or over all positions of all examples."""
    a_rows, g_rows, total = [], [], sum(len(y) for _, y in batches)
    for x, y in batches:
        out = model.conv(x)
        loss = F.cross_entropy(model.head(torch.tanh(out).mean((2, 3))), y, reduction="sum")
        (g,) = torch.autograd.grad(loss, out)
        a, g = append_one(conv_patches(model.conv, x).flatten(2)), g.flatten(2).mT
        a_rows.append(a.mean(1) if by_example else a.flatten(0, 1))
        g_rows.append(g.sum(1) if by_example else g.flatten(0, 1))
    a, g = torch.cat(a_rows), torch.cat(g_rows)
    return a.T @ a / len(a), g.T @ g / total


@pytest.mark.parametrize("channels", [2, 20], ids=["dense", "thin"])
@pytest.mark.parametrize("case", METHODS)
def test_images_of_different_sizes_weigh_by_what_the_factor_averages(case: str, channels: int) -> None:
    method, sharing, by_example = METHODS[case]
    model = Pooled(channels).double()
    batches = [(torch.randn(n, channels, s, s).double(), torch.randint(4, (n,))) for n, s in SIZES]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = kfac_fx.compile(
        model, F.cross_entropy, method=method, optimizer=optimizer, sharing=sharing, backend="eager"
    )
    for x, y in batches:
        step.accumulate(x, y)
    step.update()
    state = step.state_dict()["curvature"]["conv.weight"]
    thin = state.get("A_rows", torch.empty(1, 0, 0))[0]
    a = state["A"][0] if "A" in state else thin.T @ thin
    expected_a, expected_g = dense_factors(model, batches, by_example=by_example)
    assert relative_error(a, expected_a) < 1e-12
    if "G" in state:
        assert relative_error(state["G"][0], expected_g) < 1e-12
    other, _ = dense_factors(model, batches, by_example=not by_example)
    assert relative_error(a, other) > 1e-2
