"""Numbers and nouns in messages and reports agree."""

import pytest
import torch
from torch import nn

import kfac_fx
from kfac_fx import report
from kfac_fx.report.numbers import part_text
from kfac_fx.wording import counted, with_article


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 layers"), (1, "1 layer"), (2, "2 layers"), (1000, "1,000 layers")]
)
def test_one_is_singular_and_all_else_is_plural(number: int, text: str) -> None:
    assert counted(number, "layer") == text


@pytest.mark.parametrize(("noun", "text"), [("int", "an int"), ("Adam", "an Adam"), ("str", "a str")])
def test_the_article_fits_the_noun(noun: str, text: str) -> None:
    assert with_article(noun) == text


def test_the_report_of_one_layer_and_one_term_is_in_the_singular() -> None:
    model = nn.Linear(3, 2)
    x, y = torch.randn(2, 3), torch.tensor([0, 1])
    text = report.render(kfac_fx.inspect(model, nn.functional.cross_entropy, x, y))
    assert "2 examples x 1 term\n" in text and "matched  1 layer, 8 of 8 parameters" in text
    text = report.render(kfac_fx.inspect(model, lambda out, t: out.square().mean(), x[:1], y[:1]))
    assert "over the 1 example of the batch" in text


@pytest.mark.parametrize("method", ["nkfac", "singd", "foof"])
def test_the_reason_of_an_added_parameter_is_not_that_of_a_norm_alone(method: str) -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.zeros(4, 3))
            self.head = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x + self.position)

    x = torch.randn(5, 4, 3)
    plan = kfac_fx.inspect(Positions(), nn.functional.mse_loss, x, torch.randn(5, 4, 2), method=method)
    (skip,) = plan.skipped
    assert skip.parameter == "position" and "added parameters" in skip.detail


@pytest.mark.parametrize(
    ("part", "text"),
    [(1.0, "100.0%"), (52_544 / 52_547, ">99.9%"), (0.9994, "99.9%"), (3 / 52_547, "<0.1%"), (0.0, "0.0%")],
)
def test_a_part_is_rounded_neither_to_all_nor_to_nothing(part: float, text: str) -> None:
    assert part_text(part) == text
