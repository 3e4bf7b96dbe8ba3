"""Products of rows with themselves, whatever way they are computed, against einsum in float64."""

import pytest
import torch

from kfac_fx.gram import gram


@pytest.mark.parametrize("d", [1, 7, 511, 512, 513, 515, 1025])
@pytest.mark.parametrize("groups", [1, 2])
def test_rows_of_any_width_and_layout_give_the_same_symmetric_matrix(d: int, groups: int) -> None:
    rows = torch.randn(groups, 3, 5, d, dtype=torch.float64)
    wanted = torch.einsum("gnti,gntj->gij", rows, rows)
    images = rows.transpose(2, 3).contiguous().transpose(2, 3)  # positions side by side, as in images
    long = rows.flatten(1, 2).unsqueeze(1).mT.contiguous().mT
    for found in (gram(rows), gram(images), gram(rows.flatten(1, 2)), gram(long)):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(found, found.mT, rtol=0, atol=1e-13)


def test_few_channels_of_many_positions_are_a_product_per_example() -> None:
    rows = torch.randn(2, 3, 4, 50, dtype=torch.float64).transpose(2, 3)
    wanted = torch.einsum("gnti,gntj->gij", rows, rows)
    torch.testing.assert_close(gram(rows), wanted, rtol=0, atol=1e-12)
