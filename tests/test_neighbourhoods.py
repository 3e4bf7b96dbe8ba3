"""The drawing of a layer's surroundings: lanes that agree with the programs, work that does not grow."""

import re
import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import kfac_fx
from kfac_fx.export import page_graph
from kfac_fx.export.page_boxes import BACKWARD, FORWARD, is_inserted
from kfac_fx.export.page_graph import Surveyor
from kfac_fx.export.subject import statistics_step
from kfac_fx.export.train_step import export_train_step
from kfac_fx.planned import Plan
from kfac_fx.target import Target


@pytest.fixture(scope="module")
def target() -> Target:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3))
    inputs, targets = torch.randn(3, 2, 4, 4), torch.randint(3, (3,))
    loss_fn = nn.CrossEntropyLoss()
    return Target(model=nn.Sequential(*layers), loss_fn=loss_fn, inputs=inputs, targets=targets, label="")


@pytest.fixture(scope="module")
def plan(target: Target) -> Plan:
    return kfac_fx.inspect(target.model, target.loss_fn, target.inputs, target.targets)


def halves(text: str, indent: int) -> dict[str, str]:
    """What stands above each variable of a program that has no line of the user's: its half, by name."""
    found, half = {}, ""
    for line in text.splitlines():
        if said := re.match(rf" {{{indent}}}# (?!kfac_fx: )(.*)", line):
            half = said[1]
        elif not line.strip():
            half = ""
        elif half in ("backward", "no source line"):
            if assigned := re.match(rf" {{{indent}}}(\w+)(?:: \"[^\"]*\")? = ", line):
                found[assigned[1]] = half
    return found


def test_programs_the_standalone_step_and_lanes_agree_on_what_is_backward(plan: Plan, target: Target) -> None:
    step = statistics_step(plan)
    told = halves(step.texts[0].text, 8)
    text = str(export_train_step(plan, target)["train_step.py"])
    written = halves(text[text.index("def loss_gradients_and_statistics") :], 4)
    common = told.keys() & written.keys()
    assert {name: written[name] for name in common} == {name: told[name] for name in common}
    assert set(told.values()) == {"backward", "no source line"} and len(common) >= 5
    drawn = 0
    for match in plan.matched:
        for box in Surveyor(plan, step.program).around(match).boxes:
            for node in box.nodes:
                if node.name in told and not is_inserted(node):
                    drawn += 1
                    assert box.lane == (BACKWARD if told[node.name] == "backward" else FORWARD), node
    assert drawn >= 3


def lines_run(surveyor: Surveyor, plan: Plan) -> int:
    """Lines of `page_graph` that run to draw the last layer."""
    count, last = 0, next(match for match in plan.matched if match.name == str(len(plan.matched) - 1))

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename != page_graph.__file__:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        surveyor.around(last)
    finally:
        sys.settrace(before)
    return count


def test_drawing_the_last_layer_is_the_same_work_however_many_stand_before_it() -> None:
    """But for a few lines: a search that ends at the first hit reads sets in any order."""
    counts = []
    for depth in (2, 10):
        model, batch = nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth))), torch.ones(2, 4)
        with kfac_fx.without_passes("stacks"):
            plan = kfac_fx.inspect(model, nn.MSELoss(), batch, batch)
        counts.append(lines_run(Surveyor(plan, statistics_step(plan).program), plan))
    assert counts[0] > 50 and abs(counts[1] - counts[0]) < 40


def test_a_layer_in_a_stack_is_drawn_with_its_own_tensors_alone() -> None:
    model, batch = nn.Sequential(*(nn.Linear(4, 4) for _ in range(8))), torch.ones(2, 4)
    plan = kfac_fx.inspect(model, nn.MSELoss(), batch, batch)
    program = statistics_step(plan).program
    assert any("and 7 like it" in node.meta.get("kfac_fx", "") for node in program.module.graph.nodes)
    surveyor = Surveyor(plan, program)
    for match in plan.matched:
        drawing = surveyor.around(match)
        titles = [box.title for box in drawing.boxes]
        ends = ("gradient as a matrix", "direction", "weight direction", "bias direction")
        wanted = [*ends, "weight gradient", "stored A_inverse", "stored G_inverse"]
        assert [titles.count(title) for title in wanted] == [1] * len(wanted), titles
        assert not any(" of " in title for title in titles if title.startswith("stored")), titles
        (direction,) = drawing.boxes[titles.index("direction")].nodes
        assert direction.name == f"layer_{match.name}_direction"
