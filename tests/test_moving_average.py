"""The moving average takes every finite batch, however large, and no other."""

import pytest
import torch

from kfac_fx.methods.base import averaged

LARGE = 1e38  # the sum of four of them is infinite in float32


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_large_entries_whose_sum_overflows_are_averaged(sign: float) -> None:
    old, new = torch.zeros(1, 3, 3), torch.full((1, 3, 3), sign * LARGE)
    found = averaged(old, new, torch.tensor(0.75))
    assert torch.isinf(found.sum())
    torch.testing.assert_close(found, torch.full((1, 3, 3), sign * 0.75 * LARGE))


def test_opposite_extremes_are_averaged() -> None:
    new = torch.tensor([[[3e38, -3e38], [-3e38, 3e38]]])
    assert torch.equal(averaged(torch.zeros(1, 2, 2), new, torch.tensor(1.0)), new)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_entry_that_is_not_finite_leaves_the_old(bad: float) -> None:
    old, new = torch.randn(1, 3, 3), torch.randn(1, 3, 3)
    new[0, 1, 2] = bad
    assert torch.equal(averaged(old, new, torch.tensor(0.5)), old)
