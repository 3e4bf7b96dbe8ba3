"""The stand-in of `tests/benchmarks/step_time.py`: its factors, inverses and direction are K-FAC's."""

import math

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
from tests.benchmarks.hooked import HookedKFAC
from tests.helpers import batch_factors
from tests.oracles import relative_error

DAMPING = 0.1


def network(*, bias: bool) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=bias),
        nn.Tanh(),
        nn.Conv2d(4, 5, (3, 2), stride=2, padding=(0, 1), dilation=(1, 2), bias=bias),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(5 * 12, 3, bias=bias),
    )
    return model.double()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 2, 7, 7, dtype=torch.float64), torch.randint(3, (6,))


@pytest.mark.parametrize("bias", [True, False])
def test_factors_of_one_batch_are_those_of_the_library(bias: bool) -> None:
    model, (x, y), loss_fn = network(bias=bias), batch(), nn.CrossEntropyLoss()
    expected = batch_factors(model, loss_fn, x, y, fisher="empirical", sharing="expand")
    hooked = HookedKFAC(model)
    loss_fn(model(x), y).backward()
    assert {f"{name}.weight" for name in hooked.layers} == set(expected)
    for name in hooked.layers:
        for side, factors in (("A", hooked.A), ("G", hooked.G)):
            assert relative_error(factors[name], expected[f"{name}.weight"][side][0]) < 1e-12


@pytest.mark.parametrize("kl_clip", [1e-3, 1e9])
def test_its_step_is_that_of_the_library(kl_clip: float) -> None:
    model, (x, y), loss_fn, lr = network(bias=True), batch(), nn.CrossEntropyLoss(), 0.5
    hooked = HookedKFAC(model, damping=DAMPING, kl_clip=kl_clip)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss_fn(model(x), y).backward()
    hooked.refresh()
    hooked.precondition(lr)
    directions = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    twin = network(bias=True)
    method = kfac_fx.KFAC(damping=DAMPING, kl_clip=kl_clip, inverse_every=1)
    optimizer = torch.optim.SGD(twin.parameters(), lr=lr)
    kfac_fx.compile(twin, loss_fn, method=method, optimizer=optimizer, backend="eager")(x, y)
    for name, after in twin.named_parameters():
        assert relative_error(directions[name], (before[name] - after.detach()) / lr) < 1e-9


def test_averages_move_only_when_statistics_are_collected() -> None:
    model, (x, y), loss_fn = network(bias=True), batch(), nn.CrossEntropyLoss()
    hooked = HookedKFAC(model, decay=0.75)
    loss_fn(model(x), y).backward()
    first = {name: factor.clone() for name, factor in hooked.A.items()}
    hooked.collects = False
    loss_fn(model(3 * x), y).backward()
    assert all(torch.equal(hooked.A[name], first[name]) for name in first)
    hooked.collects = True
    loss_fn(model(3 * x), y).backward()
    d, scale = 2 * 9, 0.75 + 0.25 * 9
    assert relative_error(hooked.A["0"][:d, :d], scale * first["0"][:d, :d]) < 1e-12
    assert math.isclose(float(hooked.A["0"][d, d]), 1.0)
