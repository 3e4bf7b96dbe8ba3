"""Programs that run as they are written lay large statistics out anew, and train as before."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import kfac_fx
from kfac_fx import eager
from kfac_fx.eager import averages, choices
from kfac_fx.editing import copy_module
from kfac_fx.instrument import instrument
from kfac_fx.methods import METHODS
from tests.programs import program
from tests.training import differing, snapshot, twin

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")
aten = torch.ops.aten


def net() -> nn.Module:
    conv = nn.Conv2d(2, 4, 3, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, 3))


def wide_net() -> nn.Module:
    """Every way to join: borders, halves of symmetric products, lines of shifted images."""
    conv, first, second = (
        nn.Conv2d(96, 4, 3, padding=1),
        nn.Linear(4 * 16, 600),
        nn.Linear(600, 260, bias=False),
    )
    return nn.Sequential(
        conv, nn.ReLU(), nn.Flatten(), first, nn.Tanh(), second, nn.Tanh(), nn.Linear(260, 3)
    )


def wide_batch() -> tuple[Tensor, Tensor]:
    return torch.randn(64, 96, 4, 4), torch.randint(3, (64,))


def statistics_program(model: nn.Module, batch: tuple[Tensor, Tensor], method: Any = "kfac") -> GraphModule:
    plan = kfac_fx.inspect(model, F.cross_entropy, *batch, method=method)
    return instrument(plan, "statistics").module


def arguments(module: GraphModule) -> list[Tensor]:
    """Random tensors for a program; states are symmetric, shares and counts positive."""
    found = []
    for node in module.graph.find_nodes(op="placeholder"):
        like = node.meta["val"]
        if not like.is_floating_point():
            found.append(torch.randint(3, like.shape))
            continue
        tensor = torch.randn(like.shape, dtype=like.dtype)
        square = tensor.dim() == 3 and tensor.shape[-1] == tensor.shape[-2]
        found.append(tensor @ tensor.mT if square else tensor.abs() / (1 + tensor.abs()))
    return found


def count(module: GraphModule, *targets: Any, least: int = eager.LEAST_BYTES) -> int:
    """Calls of these operators with results of at least so many bytes."""
    nodes = [node for node in module.graph.nodes if node.target in targets and "val" in node.meta]
    return sum(node.meta["val"].nbytes >= least for node in nodes)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("products", [True, False])
def test_no_method_trains_differently(name: str, products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To rounding; to the bit where averages are not taken in products."""
    torch.manual_seed(0)
    if not products:
        monkeypatch.setattr(eager, "average_in_products", lambda graph, is_large: None)
    model, batches = net().double(), [(torch.randn(6, 2, 5, 5), torch.randint(3, (6,))) for _ in range(4)]
    other, snapshots = twin(model), []
    for least, own in ((0, model), (2**40, other)):
        monkeypatch.setattr(eager, "LEAST_BYTES", least)
        every = {"statistics_every": 1} | ({} if METHODS[name].inverse_every == 0 else {"inverse_every": 2})
        step = kfac_fx.compile(own, F.cross_entropy, method=METHODS[name](**every), backend="eager")
        for x, y in batches:
            step(x.double(), y)
        snapshots.append(snapshot(own, step))
    assert products or not differing(*snapshots)
    torch.testing.assert_close(*snapshots, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reads", [True, False])
def test_large_factors_take_fewer_passes(reads: bool) -> None:
    torch.manual_seed(0)
    module = statistics_program(wide_net(), wide_batch())
    changed = eager.rewritten(module, reads=reads)
    assert count(module, aten.cat.default, aten.stack.default) >= 20
    assert not count(changed, aten.cat.default, aten.stack.default)
    assert count(module, aten.where.self) >= 5
    assert count(changed, aten.where.self) == 0
    assert count(changed, choices.chosen) == (count(module, aten.where.self) if reads else 0)
    products = count(changed, aten.addmm.out, least=0)
    assert products >= 4 + 4 + 1 if reads else products == 0
    tensors = arguments(module)
    before = [tensor.clone() for tensor in tensors]
    for own, expected in zip(changed(*tensors), module(*tensors), strict=True):
        torch.testing.assert_close(own, expected, rtol=2e-5, atol=2e-5)
    assert all(map(torch.equal, tensors, before))


def product(x: Tensor, old: Tensor, share: Tensor) -> Tensor:
    return torch.lerp(old, x.mT @ x, share)


def guarded(x: Tensor, s_old: Tensor, share: Tensor) -> Tensor:
    """As a layer's average is: the name tells that the old one is state."""
    mixed = torch.lerp(s_old, x.mT @ x / 7 * share, share)
    least, most = torch.aminmax(mixed)
    return torch.where(torch.isfinite(least) & torch.isfinite(most), mixed, s_old)


def of_one_group(x: Tensor, old: Tensor, share: Tensor) -> Tensor:
    old = old.unsqueeze(0)
    return torch.lerp(old, (x.mT @ x).unsqueeze(0) / 7, share)


def halves(x: Tensor, old: Tensor, share: Tensor) -> Tensor:
    upper = [x[:, :2].mT @ x, x[:, 2:].mT @ x[:, 2:]]
    moment = torch.cat([upper[0], torch.cat([upper[0][:, 2:].mT, upper[1]], 1)], 0)
    return torch.lerp(old, moment / 3, share)


def bordered_halves(x: Tensor, old: Tensor, share: Tensor) -> Tensor:
    y = x[:, :3]
    upper = [y[:, :2].mT @ y, y[:, 2:].mT @ y[:, 2:]]
    moment = torch.cat([upper[0], torch.cat([upper[0][:, 2:].mT, upper[1]], 1)], 0)
    column = y.sum(0).unsqueeze(1)
    below = torch.cat([column.mT, torch.ones_like(column[:1])], 1)
    return torch.lerp(old, torch.cat([torch.cat([moment, column], 1), below], 0) / 3, share)


def read_by_another(x: Tensor, old: Tensor, share: Tensor) -> Tensor:
    moment = x.mT @ x
    return torch.lerp(old, moment / torch.linalg.vector_norm(moment), share)


def returned_too(x: Tensor, old: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    moment = x.mT @ x
    return moment, torch.lerp(old, moment / 7, share)


def scaled_too(x: Tensor, old: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    moment = x.mT @ x / 7
    return moment + 1, torch.lerp(old, moment, share)


def of_a_later_share(x: Tensor, old: Tensor, share: Tensor) -> Tensor:
    moment = x.mT @ x
    return torch.lerp(old, moment, share * 2)


def scaled_by_columns(x: Tensor, old: Tensor, share: Tensor) -> Tensor:
    return torch.lerp(old, (x.mT @ x) * x[0], share)


def broadcast(x: Tensor, old: Tensor, share: Tensor) -> Tensor:
    return torch.lerp(old[0], x.mT @ x, share)


def joined_with_a_narrow_border(x: Tensor, old: Tensor, share: Tensor) -> Tensor:
    return torch.lerp(old, torch.cat([x[:, :3].mT @ x, x[:1].float()], 0), share)


def repeated(x: Tensor, old: Tensor, share: Tensor) -> Tensor:
    """The same block twice: no mirror, so it is mixed with another part of the old."""
    block = x[:, :2].mT @ x
    return torch.lerp(old, torch.cat([block, block], 0), share)


def mirrored_elsewhere(x: Tensor, old: Tensor, share: Tensor) -> Tensor:
    upper = [x[:, :2].mT @ x, x[:, 2:].mT @ x[:, 2:]]
    return torch.lerp(old, torch.cat([upper[0], torch.cat([upper[0][:, :2].mT, upper[1]], 1)], 0), share)


def hardly_a_product(x: Tensor, old: Tensor, share: Tensor) -> Tensor:
    return torch.lerp(old, torch.cat([x[:, :1].mT @ x, x[:3] + 1], 0), share)


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (product, 1),
        (guarded, 1),
        (of_one_group, 1),
        (halves, 2),
        (bordered_halves, 2),
        (read_by_another, 0),
        (returned_too, 0),
        (scaled_too, 0),
        (of_a_later_share, 0),
        (scaled_by_columns, 0),
        (broadcast, 0),
        (joined_with_a_narrow_border, 0),
        (repeated, 0),
        (mirrored_elsewhere, 0),
        (hardly_a_product, 0),
    ],
)
def test_averages_are_taken_in_products_that_nobody_else_reads(function: Any, products: int) -> None:
    torch.manual_seed(0)
    x, noise = torch.randn(2, 5, 4, dtype=torch.float64).unbind()
    old, share = noise.mT @ noise, torch.tensor(0.3, dtype=torch.float64)
    changed = averaged_in_products(program(function, x, old, share))
    assert count(changed, aten.addmm.out, least=0) == products
    assert count(changed, aten.lerp.Tensor, least=0) == (products == 0)
    for own_share in (share, torch.ones_like(share)):
        before = x.clone(), old.clone()
        expected = function(x, old, own_share)
        torch.testing.assert_close(changed(x, old, own_share), expected, rtol=1e-13, atol=1e-13)
        assert torch.equal(x, before[0]) and torch.equal(old, before[1])


def averaged_in_products(module: GraphModule) -> GraphModule:
    changed, _ = copy_module(module)
    averages.average_in_products(changed.graph, lambda node: node.op == "call_function")
    changed.recompile()
    return changed


@pytest.mark.parametrize("lies", ["behind others", "transposed", "apart"])
@pytest.mark.parametrize("function", [product, bordered_halves])
def test_the_old_average_may_lie_anywhere_in_memory(function: Any, lies: str) -> None:
    """States that were loaded are what the user gave: parts of a larger tensor, say."""
    torch.manual_seed(0)
    x, noise = torch.randn(2, 5, 4, dtype=torch.float64).unbind()
    second, share = noise.mT @ noise, torch.tensor(0.3, dtype=torch.float64)
    old = {
        "behind others": torch.stack([torch.full_like(second, 7.0), second])[1],
        "transposed": second.mT.clone().mT,
        "apart": torch.stack([second, torch.full_like(second, 7.0)], -1)[..., 0],
    }[lies]
    assert torch.equal(old, second)
    changed = averaged_in_products(program(function, x, second, share))
    assert count(changed, aten.addmm.out, least=0)
    torch.testing.assert_close(changed(x, old, share), function(x, second, share), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_average_that_is_not_finite_leaves_the_old(bad: float) -> None:
    torch.manual_seed(0)
    x, old, share = torch.randn(5, 4), torch.randn(4, 4), torch.tensor(0.3)
    changed = eager.rewritten(program(guarded, x, old, share), reads=True, least_bytes=0)
    assert count(changed, choices.chosen, least=0) and count(changed, aten.addmm.out, least=0)
    x[2, 3] = bad
    before = old.clone()
    assert changed(x, old, share) is old and torch.equal(old, before)


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        ([(True, 4.0), (False, torch.tensor(2.0))], 0.5),
        ([(True, torch.tensor(0.0))], math.inf),
        ([(False, 1e30), (False, torch.tensor(1e30))], math.inf),
        ([(False, torch.tensor(math.nan))], math.nan),
    ],
)
def test_shares_are_what_tensors_would_give(scales: Any, expected: float) -> None:
    keep, take = averages.shares(torch.tensor(1.0), scales, torch.float32)
    assert keep == 0.0 and take == pytest.approx(expected, nan_ok=True)


def test_small_programs_stay_as_they_are() -> None:
    model, x = nn.Linear(8, 2), torch.randn(5, 8)
    plan = kfac_fx.inspect(model, F.mse_loss, x, torch.randn(5, 2), method="kfac")
    module = instrument(plan, "statistics").module
    assert eager.rewritten(module, reads=True) is module
