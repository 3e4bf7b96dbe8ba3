"""Several steps in one process: captured by threads at once; a step itself is not copied."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx.errors import KfacFxError
from tests.training import twin


def net(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 3))


def trained(model: nn.Module, method: str, data: tuple[Tensor, Tensor]) -> Tensor:
    step = kfac_fx.compile(model, F.cross_entropy, method=method, backend="eager")
    return torch.stack([step(*data) for _ in range(3)])


def test_threads_that_capture_at_once_train_as_one_after_the_other() -> None:
    models = [net(width) for width in (4, 5, 6)]
    methods, data = ("kfac", "nkfac", "foof"), (torch.randn(6, 5), torch.randint(3, (6,)))
    wanted = [trained(twin(model), method, data) for model, method in zip(models, methods, strict=True)]
    with ThreadPoolExecutor(max_workers=3) as pool:
        found = list(pool.map(trained, models, methods, [data] * 3))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda f: f.__name__)
@pytest.mark.parametrize("ran", [False, True])
def test_a_step_refuses_to_be_copied_and_names_what_to_do(copied: Callable[[Any], Any], ran: bool) -> None:
    step = kfac_fx.compile(nn.Linear(2, 3), F.cross_entropy, backend="eager")
    if ran:
        step(torch.randn(4, 2), torch.randint(3, (4,)))
    with pytest.raises(KfacFxError, match=r"cannot be copied or pickled.*state_dict\(\)"):
        copied(step)
