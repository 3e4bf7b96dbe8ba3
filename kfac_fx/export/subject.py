"""What every part of the folder is made of: a plan, its model, and the statistics step, written once.

Enters: a plan and its target. Leaves: the step's program, and its text after each pass. Nodes keep their
names from program to program.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import final

from torch.fx import GraphModule

from kfac_fx.instrument import Program, instrument
from kfac_fx.planned import Plan
from kfac_fx.report.program import readable
from kfac_fx.report.rows import settings
from kfac_fx.stages import PASSES, PassRecord
from kfac_fx.target import Target

FILES = {
    "capture": "captured",
    "match": "matched",
    "guard": "guarded",
    "statistics": "statistics",
    "averages": "averages",
    "precondition": "preconditioned",
    "lengths": "lengths",
    "products": "products",
    "cleanup": "cleaned",
}


@final
@dataclass(frozen=True, kw_only=True)
class PassProgram:
    """The program as a pass leaves it. name: of the pass. file: of the program, without a folder."""

    name: str
    file: str
    text: str


@final
@dataclass(frozen=True, kw_only=True)
class StatisticsStep:
    """The step with statistics. texts: as captured and after each pass that is not off."""

    program: Program
    texts: tuple[PassProgram, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Subject:
    """What the parts of a folder read. target: the model and batch that the plan was made of."""

    plan: Plan
    target: Target

    @cached_property
    def step(self) -> StatisticsStep:
        """The step with statistics; written when it is first read."""
        return statistics_step(self.plan)


def statistics_step(plan: Plan) -> StatisticsStep:
    """Write the step with statistics, keeping its text after each pass."""
    found: list[PassProgram] = []
    before = 0

    def keep(name: str, record: PassRecord | None, module: GraphModule) -> None:
        nonlocal before
        file = f"{len(found)}-{FILES[name]}.py"
        now = len(module.graph.nodes) - len(module.meta["kfac_fx_unread"])
        grown = f"{now - before:+d} nodes; " if found and now != before else ""
        did = PASSES[name] if record is None else record.did.partition(": ")[2]
        notes = (about(plan), f"{name}: {grown}{did}")
        title = f"{plan.capture.model_name} after the pass {name!r}"
        found.append(PassProgram(name=name, file=file, text=readable(module, title=title, notes=notes)))
        before = now

    program = instrument(plan, "statistics", on_pass=keep)
    return StatisticsStep(program=program, texts=tuple(found))


def about(plan: Plan) -> str:
    """Method and settings, for the head of a program."""
    return ", ".join(f"{name} {value}" for name, value in settings(plan))
