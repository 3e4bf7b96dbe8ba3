"""The counter of calls that wait for a device finds each kind of them, and nothing else."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.waits import counted


def put(values: Tensor) -> None:
    values[values > 0] = values + 1


CALLS: list[tuple[str, Callable[[Tensor], Any]]] = [
    ("item", lambda t: t[0, 0].item()),
    ("tolist", lambda t: t.tolist()),
    ("__bool__", lambda t: bool(t[0, 0])),
    ("__float__", lambda t: float(t[0, 0])),
    ("nonzero", lambda t: t.nonzero()),
    ("tensor", lambda t: torch.tensor(1.0, device=t.device)),
    ("where", lambda t: torch.where(t > 0, t, 0.0)),
    ("index", lambda t: t[t > 0]),
    ("index_put_", lambda t: put(t[0, :1].clone())),
    ("masked_select", lambda t: t.masked_select(t > 0)),
    ("_unique2", lambda t: t.unique()),
    ("repeat_interleave", lambda t: t.repeat_interleave(t[0].long(), 0)),
    ("_local_scalar_dense", lambda t: t[: t[0, 0].long()]),
    ("equal", lambda t: t.equal(t)),
    ("_linalg_check_errors", torch.linalg.cholesky),
    ("_linalg_check_errors", torch.linalg.inv),
    ("_linalg_check_errors", lambda t: torch.linalg.solve(t, t)),
    ("_linalg_eigh", torch.linalg.eigh),
    ("_linalg_eigh", torch.linalg.eigvalsh),
    ("_linalg_svd", lambda t: torch.linalg.matrix_norm(t, 2)),
]


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_the_counter_counts(name: str, call: Callable[[Tensor], Any]) -> None:
    value = torch.eye(2)
    with counted() as reads:
        call(value)
    assert reads[name]


def test_the_counter_does_not_count_what_stays_on_the_device() -> None:
    value = torch.eye(2)
    with counted() as reads:
        torch.where(value > 0, value, value).masked_fill(value > 2, 0.0)
        value[torch.zeros(1, dtype=torch.long)].repeat_interleave(2)
        torch.linalg.cholesky_ex(value)
        torch.linalg.inv_ex(value)
        value[0] = 1.0
    assert reads == Counter()
