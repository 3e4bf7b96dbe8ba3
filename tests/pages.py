"""Plans and pages that the tests of reports and of `index.html` share."""

from pathlib import Path

import torch
from torch import Tensor, nn

import kfac_fx
from kfac_fx.export.page import page
from kfac_fx.export.page_data import page_data
from kfac_fx.export.subject import statistics_step
from kfac_fx.planned import Plan
from kfac_fx.target import load_target

GOLDEN = Path(__file__).parent / "golden"
HOSTILE = "</script><img src=x onerror=alert(1)>\"'&é{{data}}"


class Hostile(nn.Module):
    """A layer whose name, and a line whose text, would end a script element if they were not escaped."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module(HOSTILE, nn.Linear(3, 4))
        self.register_parameter(f"{HOSTILE} alone", nn.Parameter(torch.zeros(7)))

    def forward(self, x: Tensor) -> Tensor:
        return self._modules[HOSTILE](x)  # </script><img src=x onerror=alert(2)>


def plan_of(text: str) -> Plan:
    """The plan of a TARGET."""
    target = load_target(text)
    return kfac_fx.inspect(target.model, target.loss_fn, target.inputs, target.targets, method="kfac")


def hostile_plan() -> Plan:
    """Of `Hostile`."""
    return kfac_fx.inspect(
        Hostile(), lambda y, t: (y - t).square().mean(), torch.ones(5, 3), torch.ones(5, 4)
    )


def page_of(plan: Plan) -> str:
    """`index.html`."""
    return page(plan, page_data(plan, statistics_step(plan)))
