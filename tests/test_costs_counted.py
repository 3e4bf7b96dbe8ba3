"""FLOPs of a plan against torch's own counter on the programs that run.

The counter sees products and convolutions alone, in a program with statistics less one without. What it
does not see is either in the plan too (sums over positions, read off the program here) or left out of both
(divisions, masks). A plan counts a bias as one more feature of a product, the program adds it up: of 33
features for 32 that is 6%, the tolerance.
"""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import kfac_fx
from kfac_fx import report
from kfac_fx.autocorrelation import masked_moment
from kfac_fx.forms import LARGEST_PATCHES
from kfac_fx.graph import fake_mode
from kfac_fx.instrument import instrument
from kfac_fx.layout import Geometry
from kfac_fx.planned import Plan
from kfac_fx.report.numbers import flops_text
from kfac_fx.windows import patches
from tests.oracles import flop_counter
from tests.test_statistics_memory import made

TOLERANCE = 0.07
CLASSES = 4
aten = torch.ops.aten


class Attention(nn.Module):
    """One layer with a residual connection, and a head."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.joint, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, width] to [N, T, classes]."""
        query, key, value = self.joint(x).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.head(x + self.out(mixed))


class Experts(nn.Module):
    """A weight per position, chosen by its largest input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(32, 32), nn.Linear(16, CLASSES)
        self.experts = nn.Parameter(torch.randn(3, 16, 32))

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, 32] to [N, T, classes]."""
        x = self.first(x)
        chosen = self.experts[x.argmax(-1).flatten() % 3]
        return self.head(torch.bmm(chosen, x.reshape(-1, 32, 1)).reshape(*x.shape[:2], -1))


class Linear(nn.Sequential):
    """Two layers on [N, T, 32]."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, CLASSES))


class Convolution(nn.Sequential):
    """With padding, groups, a stride and a transposed one; A of the first is cheapest without patches."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(8, 8, 5, padding=2),
            nn.Tanh(),
            nn.Conv2d(8, 16, 3, stride=2, groups=2),
            nn.ConvTranspose2d(16, 8, 2, 2),
            nn.Conv2d(8, CLASSES, 1),
            nn.Flatten(2),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] to [N, T, classes]."""
        return super().forward(x).mT


MODELS: dict[type[nn.Module], tuple[int, ...]] = {
    Linear: (6, 5, 32),
    Convolution: (32, 8, 32, 32),
    Attention: (6, 5, 32),
    Experts: (6, 5, 32),
}
CASES: dict[str, dict[str, Any]] = {
    "unmasked": {},
    "masked": {},
    "reduce": {"sharing": "reduce"},
    "mc": {"fisher": "mc"},
    "type2": {"fisher": "type2"},
}


def of_example(out: Tensor, labels: Tensor) -> Tensor:
    """One term per example."""
    return F.cross_entropy(out.mean(1), labels[:, 0])


def of_position(out: Tensor, labels: Tensor) -> Tensor:
    """A term per position; some are ignored."""
    return F.cross_entropy(out.flatten(0, 1), labels.flatten())


@functools.cache
def make_plan(model: type[nn.Module], case: str) -> Plan:
    """KFAC for this case."""
    torch.manual_seed(0)
    network, x = model(), torch.randn(MODELS[model])
    labels = torch.randint(-1, CLASSES, network(x).shape[:2])
    labels[labels < 0], labels[:, 0] = -100, 1
    loss_fn = of_position if case == "masked" else of_example
    return kfac_fx.inspect(network, loss_fn, x, labels, method="kfac", **CASES[case])


def counted(module: GraphModule) -> int:
    """FLOPs of one run, without data."""
    inputs = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    with fake_mode(module.graph), flop_counter() as counter:
        module(*inputs)
    return counter.get_total_flops()


def additions(module: GraphModule) -> Iterator[int]:
    """Of every sum that the statistics added to the program."""
    for node, inserted, value in made(module):
        if inserted and node.target is aten.sum.dim_IntList and node.meta.get("kfac_fx_pass") == "statistics":
            yield node.args[0].meta["val"].numel() - value.numel()  # type: ignore[union-attr]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", MODELS)
def test_statistics_cost_what_the_program_computes(model: type[nn.Module], case: str) -> None:
    plan = make_plan(model, case)
    found, rendered = report.document(plan), report.render(plan)
    totals, without = found["totals"], counted(instrument(plan, "gradients").module)
    program = instrument(plan, "batch_statistics").module
    expected = counted(program) - without + (sum(additions(program)) if case == "reduce" else 0)
    assert totals["cost"]["flops_statistics"] == pytest.approx(expected, rel=TOLERANCE)
    assert totals["flops_model"] == without
    layers = sum(row["cost"]["flops_statistics"] for row in found["rows"])
    assert layers + totals["flops_fisher"] == totals["cost"]["flops_statistics"]
    line = rendered[rendered.index("per step") :]
    assert f"statistics {flops_text(totals['cost']['flops_statistics'])} " in line
    passes = f"({flops_text(totals['flops_fisher'])} in backward passes)"
    assert (passes in line) == (totals["flops_fisher"] > 0) == ("fisher" in CASES[case])


def test_where_positions_may_be_ignored_convolutions_take_patches_in_parts_and_say_why() -> None:
    free, masked = (make_plan(Convolution, case) for case in ("unmasked", "masked"))
    forms = [{u.options["form"] for m in plan.matched for u in m.uses} for plan in (free, masked)]
    assert forms[0] - {"pixels", "patches"} and forms[1] == {"pixels", "patches"}
    words = {f.form for f in masked.factors if f.side == "A"}
    assert words == {f"the loss may ignore positions: {form}^T {form}" for form in ("pixels", "patches")}
    nodes = list(made(instrument(masked, "batch_statistics").module))
    largest = max(value.numel() for _, inserted, value in nodes if not inserted)
    inserted = max(value.numel() for _, inserted, value in nodes if inserted)
    assert max(match.d_in**2 for match in masked.matched) < inserted <= LARGEST_PATCHES * largest


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("examples", [1, 3, 40])
def test_patches_in_parts_leave_out_the_rows_of_ignored_positions(examples: int, transposed: bool) -> None:
    space, per_axis = (9, 8), {"kernel": (5, 3), "stride": (2, 1), "padding": (2, 0), "dilation": (1, 2)}
    geometry = Geometry(**per_axis, groups=2, transposed=transposed, output_padding=(0, 0), space=space)
    torch.manual_seed(0)
    x = torch.randn(examples, 4, *space, dtype=torch.float64)
    rows = patches(x, geometry)
    kept = torch.rand(rows.shape[1:3]) < 0.6
    found = masked_moment(x, geometry, form="patches", ones=True, kept=kept)
    left = torch.stack([of_group[kept] for of_group in rows])
    torch.testing.assert_close(found.moment, left.mT @ left)
    torch.testing.assert_close(found.total, left.sum(1))
    assert found.count == kept.sum()


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_convolutions_backward_costs_its_forward_twice_whatever_its_groups(groups: int) -> None:
    """Torch's counter takes all channels for those of a group in the gradient of the weight."""
    conv = nn.Conv2d(8, 8, 3, groups=groups, padding=1)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), conv, nn.Flatten(), nn.Linear(8 * 25, 3))
    plan = kfac_fx.inspect(model, F.cross_entropy, torch.randn(2, 8, 5, 5), torch.randint(3, (2,)))
    pixels, first, last = 2 * 25, 2 * 8 * 8, 2 * 2 * (8 * 25) * 3
    assert plan.model_flops == 2 * pixels * first + 3 * pixels * 2 * 8 * (8 // groups) * 9 + 3 * last
