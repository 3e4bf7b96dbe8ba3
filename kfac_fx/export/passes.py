"""The program of a statistics step after each pass, and what each pass changed: the folder `passes/`.

Enters: a subject. Leaves: numbered Python programs and unified diffs. Nodes keep their names from program to
program, so that a diff shows what was inserted and nothing else.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence

from kfac_fx.export.subject import PassProgram, Subject, about
from kfac_fx.instrument import instrument
from kfac_fx.report.program import readable

_RULE = re.compile(r"^ +# -+ (?P<section>.*?) -+$")


def passes(subject: Subject) -> Mapping[str, str | bytes]:
    """Programs by pass, what each pass changed, and the step that has no statistics."""
    plan, programs = subject.plan, subject.step.texts
    contents = {f"passes/{program.file}": program.text for program in programs}
    for number, (old, new) in enumerate(zip(programs, programs[1:], strict=False)):
        contents[f"passes/{number}-{number + 1}.diff"] = unified(old, new)
    title = f"{plan.capture.model_name}: the step without statistics"
    plain = readable(instrument(plan, "plain").module, title=title, notes=(about(plan),))
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
