"""Memory that nobody reads again is written into, no other, and no bit changes (by `placing` neither)."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node, symbolic_trace
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn import functional as F

import kfac_fx
from kfac_fx import lower, reuse
from kfac_fx.instrument import instrument
from kfac_fx.methods import METHODS
from tests.training import differing, snapshot, twin

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")
aten = torch.ops.aten


def net() -> nn.Module:
    conv = nn.Conv2d(2, 4, 3, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, 3))


def program(function: Any, *tensors: Tensor) -> GraphModule:
    """A program all of whose operators were inserted."""
    module = symbolic_trace(function)
    FakeTensorProp(module).propagate(*tensors)
    for node in module.graph.nodes:
        node.meta["kfac_fx"] = "inserted, for a test"
    return module


def into(module: GraphModule) -> dict[str, str]:
    """What is written into what."""
    found = {}
    for node in module.graph.nodes:
        if "out" in node.kwargs:
            assert isinstance(node.kwargs["out"], Node)
            found[node.name] = node.kwargs["out"].name
    return found


def averaged(x: Tensor, old: Tensor) -> Tensor:
    moment = aten.mm.default(x, x)
    mean = aten.div.Tensor(moment, 7)
    mixed = aten.lerp.Tensor(old, mean, aten.sum.default(x))
    least = aten.aminmax.default(mixed)[0]
    return aten.where.self(aten.isfinite.default(least), mixed, old)


def read_later(x: Tensor, old: Tensor) -> Tensor:
    moment = aten.mm.default(x, x)
    twice = aten.mul.Tensor(moment, 2)
    return aten.add.Tensor(aten.mm.default(twice, moment), old)


def seen_through_a_view(x: Tensor, old: Tensor) -> Tensor:
    moment = aten.mm.default(x, x)
    rows = aten.t.default(moment)
    twice = aten.mul.Tensor(moment, 2)
    return aten.mm.default(twice, rows)


def returned(x: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    moment = aten.mm.default(x, x)
    return moment, aten.sub.Tensor(moment, old)


def of_another_size(x: Tensor, old: Tensor) -> Tensor:
    return aten.mul.Tensor(aten.sum.dim_IntList(aten.mm.default(x, x), [0], True), old)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (averaged, {"div_tensor": "mm_default", "lerp_tensor": "div_tensor", "where_self": "lerp_tensor"}),
        (read_later, {"add_tensor": "mm_default_1"}),
        (seen_through_a_view, {}),
        (returned, {}),
        (of_another_size, {}),
    ],
)
def test_memory_that_ends_is_written_into_and_no_other(function: Any, expected: dict[str, str]) -> None:
    torch.manual_seed(0)
    x, old = torch.randn(4, 4), torch.randn(4, 4)
    module = program(function, x, old)
    changed = reuse.with_reuse(module, least_bytes=0)
    assert into(changed) == expected and not into(module)
    before = x.clone(), old.clone()
    torch.testing.assert_close(changed(x, old), function(x, old), rtol=0, atol=0)
    assert torch.equal(x, before[0]) and torch.equal(old, before[1])


@pytest.mark.parametrize("name", METHODS)
def test_no_bit_of_a_training_changes_by_how_memory_is_laid_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, batches = net(), [(torch.randn(6, 2, 5, 5), torch.randint(3, (6,))) for _ in range(4)]
    other, snapshots = twin(model), []
    for least, own in ((0, model), (2**40, other)):
        monkeypatch.setattr(lower, "LEAST_BYTES", least)
        every = {"statistics_every": 1} | ({} if METHODS[name].inverse_every == 0 else {"inverse_every": 2})
        step = kfac_fx.compile(own, F.cross_entropy, method=METHODS[name](**every), backend="eager")
        for batch in batches:
            step(*batch)
        snapshots.append(snapshot(own, step))
    assert not differing(*snapshots)


def test_large_factors_are_divided_averaged_and_kept_in_place_and_small_programs_stay() -> None:
    for width, expected in ((300, 3), (8, 0)):
        model, x = nn.Linear(width, 2), torch.randn(5, width)
        plan = kfac_fx.inspect(model, F.mse_loss, x, torch.randn(5, 2), method="kfac")
        module = instrument(plan, "statistics").module
        changed = reuse.with_reuse(module, least_bytes=lower.LEAST_BYTES)
        assert len(into(changed)) == expected
        assert (changed is module) == (expected == 0)
