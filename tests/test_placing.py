"""Blocks are computed where a join has them, and the program still computes the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule

from kfac_fx.eager.placing import place_blocks
from kfac_fx.editing import copy_module
from tests.programs import program

aten = torch.ops.aten
JOINS = (aten.cat.default, aten.stack.default)


def placed(module: GraphModule) -> GraphModule:
    """A copy with all its blocks placed, small ones too."""
    changed, _ = copy_module(module)
    place_blocks(changed.graph, lambda node: node.op == "call_function")
    changed.recompile()
    return changed


def joins(module: GraphModule) -> int:
    return sum(node.target in JOINS for node in module.graph.nodes)


def same(module: GraphModule, changed: GraphModule, *tensors: Tensor) -> None:
    """Results are equal, and no input is written to."""
    before = [tensor.clone() for tensor in tensors]
    torch.testing.assert_close(changed(*tensors), module(*tensors), rtol=1e-13, atol=1e-13)
    assert all(map(torch.equal, tensors, before))


def bordered(x: Tensor, y: Tensor) -> Tensor:
    moment, column = (x @ y).unsqueeze(0), x.sum(1).reshape(1, -1, 1)
    lines = torch.cat([moment, column], 2), torch.cat([column.mT, torch.ones_like(column[:, :1])], 2)
    return torch.cat(lines, 1) / 3


def mirrored(x: Tensor, y: Tensor) -> Tensor:
    upper = [x[:2] @ y, x[2:] @ y[:, 2:]]
    return torch.cat([upper[0], torch.cat([upper[0][:, 2:].mT, upper[1]], 1)], 0)


def interleaved(x: Tensor, y: Tensor) -> Tensor:
    blocks = [x @ y, y @ x, x @ x]
    lines = [torch.stack([blocks[i], blocks[j]], -1) for i, j in ((0, 1), (2, 0))]
    return torch.stack(lines, 1).flatten(2).flatten(0, 1)


def permuted(x: Tensor, y: Tensor) -> Tensor:
    moment = (x @ y).reshape(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    return torch.cat([moment, x], 1)


def twice(x: Tensor, y: Tensor) -> Tensor:
    block = x @ y
    return torch.cat([torch.cat([block, block], 1), torch.cat([y, block], 1)], 0)


def read_until_the_end(x: Tensor, y: Tensor) -> Tensor:
    block = x @ y
    last = torch.cat([block, block.mT @ x], 0)
    return torch.cat([last, last], 1)


def part_of_two_joins(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    shared = torch.cat([x @ y, y @ x], 1)
    first = torch.cat([shared, torch.cat([x, y], 1)], 0)
    return first / 3, torch.cat([shared, torch.cat([y, x], 1)], 0) / 3


def beside_an_empty_vector(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x.new_empty(0), x @ y], 1)


def returned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    block = x @ y
    return block, torch.cat([block, x], 0)


def read_later(x: Tensor, y: Tensor) -> Tensor:
    block = x @ y
    return torch.cat([block, x], 0) @ block.mT


def read_later_through_a_view(x: Tensor, y: Tensor) -> Tensor:
    block = x @ y
    rows = block[:1]
    return torch.cat([block, x], 0) @ rows.mT


def of_another_type(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x.to(torch.float32) @ y.to(torch.float32), x], 0)


def of_inputs(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, y], 0)


def through_sizes_that_are_no_view(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([(x @ y).reshape(2, 8), torch.ones_like(x.reshape(2, 8))], 1)


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (bordered, 0),  # the second line is written as a whole, by cat.out
        (mirrored, 0),
        (interleaved, 0),
        (permuted, 0),
        (twice, 0),
        (read_until_the_end, 0),
        (through_sizes_that_are_no_view, 1),
        (part_of_two_joins, 0),
        (beside_an_empty_vector, 1),
        (returned, 1),
        (read_later, 1),
        (read_later_through_a_view, 1),
        (of_another_type, 1),
        (of_inputs, 1),
    ],
)
def test_blocks_are_placed_where_nobody_reads_them_later(function: Any, left: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 4, 4, dtype=torch.float64).unbind()
    module = program(function, x, y)
    before = joins(module)
    changed = placed(module)
    assert joins(changed) == left and joins(module) == before
    same(module, changed, x, y)


class Blocks:
    """A random way to put a matrix together: products, blocks that were used before, and joins of blocks."""

    def __init__(self, draw: Callable[[Any], Any], x: Tensor) -> None:
        self._draw, self._x, self._known = draw, x, list[Tensor]()

    def block(self, rows: int, columns: int, depth: int) -> Tensor:
        kinds = ["product", "again", "mirror"]
        if depth:
            kinds += ["copy", "wrapped", "rows", "columns"] + ["woven"] * (columns % 2 == 0)
        made = self._made(self._draw(st.sampled_from(kinds)), rows, columns, depth - 1)
        self._known.append(made)
        return made

    def _made(self, kind: str, rows: int, columns: int, depth: int) -> Tensor:
        if kind in ("again", "mirror"):
            sizes = (rows, columns) if kind == "again" else (columns, rows)
            known = [tensor for tensor in self._known if tensor.shape == sizes]
            if known:
                found = self._draw(st.sampled_from(known))
                return found if kind == "again" else found.mT
        if kind == "copy":
            return self.block(columns, rows, depth).mT.clone(memory_format=torch.contiguous_format)
        if kind == "wrapped":
            return torch.cat([self.block(rows, columns, depth).unsqueeze(0)], 0).reshape(rows, columns)
        if kind == "woven":
            return torch.stack([self.block(rows, columns // 2, depth) for _ in range(2)], -1).flatten(1)
        if kind == "rows" and rows > 1:
            first = self._draw(st.integers(1, rows - 1))
            return torch.cat([self.block(n, columns, depth) for n in (first, rows - first)], 0)
        if kind == "columns" and columns > 1:
            first = self._draw(st.integers(1, columns - 1))
            return torch.cat([self.block(rows, n, depth) for n in (first, columns - first)], 1)
        start = self._draw(st.integers(0, 2))
        return self._x[start : start + rows] @ self._x[:, start : start + columns]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_matrix_of_joined_blocks_is_the_same(data: st.DataObject) -> None:
    x = torch.arange(100, dtype=torch.float64).reshape(10, 10).cos()

    def function(x: Tensor) -> tuple[Tensor, ...]:
        blocks = Blocks(data.draw, x)
        whole = [blocks.block(6, 4, 4) for _ in range(data.draw(st.integers(1, 2)))]
        return tuple(matrix / 3 for matrix in whole)

    module = program(function, x)
    changed = placed(module)
    assert joins(changed) <= joins(module)
    same(module, changed, x)
