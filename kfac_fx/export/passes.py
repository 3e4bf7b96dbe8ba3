"""The program of a statistics step after each pass, and what each pass changed: the folder `passes/`.

Enters: a subject. Leaves: numbered Python programs and unified diffs. Nodes keep their names from program to
program, so that a diff shows what was inserted and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from kfac_fx.export.page_code import Hunk, hunks
from kfac_fx.export.subject import PassProgram, Subject, about
from kfac_fx.instrument import instrument
from kfac_fx.report.program import readable

_CONTEXT = 3
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
    before, after = old.text.splitlines(), new.text.splitlines()
    lines = [f"--- passes/{old.file}", f"+++ passes/{new.file}"]
    for group in _neighbours(hunks(before, after)):
        lines += _changed(group, before, after)
    return "\n".join(lines) + "\n"


def _neighbours(found: Sequence[Hunk]) -> list[list[Hunk]]:
    """Changes whose context meets, together."""
    groups: list[list[Hunk]] = []
    for hunk in found:
        if groups and hunk[0] - groups[-1][-1][1] <= 2 * _CONTEXT:
            groups[-1].append(hunk)
        else:
            groups.append([hunk])
    return groups


def _changed(group: Sequence[Hunk], old: Sequence[str], new: Sequence[str]) -> Iterator[str]:
    """A head and the lines of some changes, with the lines around them."""
    start, end = max(group[0][0] - _CONTEXT, 0), min(group[-1][1] + _CONTEXT, len(old))
    shift = group[0][2] - group[0][0]
    grown = sum((d - c) - (b - a) for a, b, c, d in group)
    section = _section([line for _, _, c, d in group for line in new[c:d]])
    places = f"-{_span(start, end)} +{_span(start + shift, end + shift + grown)}"
    yield f"@@ {places} @@{f' {section}' if section else ''}"
    for a, b, c, d in group:
        yield from (f" {line}" for line in old[start:a])
        yield from (f"-{line}" for line in old[a:b])
        yield from (f"+{line}" for line in new[c:d])
        start = b
    yield from (f" {line}" for line in old[start:end])


def _span(start: int, end: int) -> str:
    """First line, counted from 1, and number of lines if it is not 1; of none the line before."""
    if end - start == 1:
        return str(end)
    return f"{start + (end > start)},{end - start}"


def _section(lines: Sequence[str]) -> str:
    """The first section among these lines."""
    return next((rule["section"] for line in lines if (rule := _RULE.match(line))), "")
