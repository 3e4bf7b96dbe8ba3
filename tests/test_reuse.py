"""Memory that nobody reads again is written into, no other, and no bit changes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node, symbolic_trace
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from kfac_fx.eager import reuse
from kfac_fx.editing import copy_module

aten = torch.ops.aten


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
    changed, _ = copy_module(module)
    reuse.write_into_operands(changed.graph, lambda node: node.op == "call_function")
    changed.recompile()
    assert into(changed) == expected and not into(module)
    before = x.clone(), old.clone()
    torch.testing.assert_close(changed(x, old), function(x, old), rtol=0, atol=0)
    assert torch.equal(x, before[0]) and torch.equal(old, before[1])
