"""The program of a statistics step after each pass, and what each pass changed: the folder `passes/`.

Enters: a plan. Leaves: numbered Python programs and unified diffs. Nodes keep their names from program to
program, so that a diff shows what was inserted and nothing else.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch.fx import GraphModule

from kfac_fx.contracts import Plan
from kfac_fx.instrument import instrument
from kfac_fx.report.program import readable
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
    "cleanup": "cleaned",
}
_RULE = re.compile(r"^ +# -+ (?P<section>.*?) -+$")


@final
@dataclass(frozen=True, kw_only=True)
class PassProgram:
    """The program as a pass leaves it. name: of the pass. file: of the program, without a folder."""

    name: str
    file: str
    text: str


def programs_by_pass(plan: Plan) -> tuple[PassProgram, ...]:
    """The step with statistics, as captured and after each pass that is not off."""
    found: list[PassProgram] = []
    before = 0

    def keep(name: str, record: PassRecord | None, module: GraphModule) -> None:
        nonlocal before
        file = f"{len(found)}-{FILES[name]}.py"
        now = len(module.graph.nodes) - len(module.meta["kfac_fx_unread"])
        grown = f"{now - before:+d} nodes; " if found and now != before else ""
        did = PASSES[name] if record is None else record.did.partition(": ")[2]
        notes = (_about(plan), f"{name}: {grown}{did}")
        title = f"{plan.capture.model_name} after the pass {name!r}"
        found.append(PassProgram(name=name, file=file, text=readable(module, title=title, notes=notes)))
        before = now

    instrument(plan, "statistics", on_pass=keep)
    return tuple(found)


def passes(plan: Plan, target: Target) -> Mapping[str, str | bytes]:
    """Programs by pass, what each pass changed, and the step that has no statistics."""
    programs = programs_by_pass(plan)
    contents = {f"passes/{program.file}": program.text for program in programs}
    for number, (old, new) in enumerate(zip(programs, programs[1:], strict=False)):
        contents[f"passes/{number}-{number + 1}.diff"] = unified(old, new)
    title = f"{plan.capture.model_name}: the step without statistics"
    plain = readable(instrument(plan, "plain").module, title=title, notes=(_about(plan),))
    return {**contents, "passes/step-without-statistics.py": plain}


def unified(old: PassProgram, new: PassProgram) -> str:
    """The unified diff from one program to the next. A hunk names the first section that it inserts."""
    lines = difflib.unified_diff(
        old.text.splitlines(),
        new.text.splitlines(),
        fromfile=f"passes/{old.file}",
        tofile=f"passes/{new.file}",
        lineterm="",
    )
    return "\n".join(_headed(list(lines))) + "\n"


def _headed(lines: Sequence[str]) -> Iterator[str]:
    """With the first section that a hunk inserts behind its `@@`."""
    for number, line in enumerate(lines):
        if line.startswith("@@"):
            line = f"{line} {section}" if (section := _section(lines[number + 1 :])) else line
        yield line


def _section(lines: Sequence[str]) -> str:
    for line in lines:
        if line.startswith("@@"):
            return ""
        if line.startswith("+") and (rule := _RULE.match(line[1:])):
            return rule["section"]
    return ""


def _about(plan: Plan) -> str:
    off = f", without {', '.join(sorted(plan.without))}" if plan.without else ""
    return f"method {plan.method.name}, fisher {plan.fisher}, sharing {plan.sharing}{off}"
