"""Skipped parameters, grouped for reports: alike ones in one row, each with its reason.

Enters: skips. Leaves: records of strings. What to do about a reason is the reason's own advice.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import final

from kfac_fx.errors import Reason
from kfac_fx.types import Skip, Source

_WEIGHT_AND_BIAS = ("weight", "bias")
_MOST_SOURCE_LINES = 3


@final
@dataclass(frozen=True, kw_only=True)
class SkipRow:
    """Skipped parameters of one reason whose names and details differ only in numbers.

    label: their names, with `*` for numbers that vary. sources: lines of the user's program.
    """

    label: str
    reason: Reason
    detail: str
    members: tuple[Skip, ...]
    sources: str


def skip_rows(skips: Iterable[Skip]) -> dict[Reason, list[SkipRow]]:
    """Skipped parameters by reason, in order of appearance; weight and bias of one module share a row."""
    groups: dict[Hashable, list[Skip]] = {}
    for skip in skips:
        module, last = _split(skip.parameter)
        name = (_digitless(module), last in _WEIGHT_AND_BIAS or _digitless(last))
        groups.setdefault((skip.reason, name, _digitless(skip.detail)), []).append(skip)
    rows: dict[Reason, list[SkipRow]] = {}
    for members in groups.values():
        row = SkipRow(
            label=_label([skip.parameter for skip in members]),
            reason=members[0].reason,
            detail=_wildcards([skip.detail for skip in members]),
            members=tuple(members),
            sources=_sources([skip.source for skip in members if skip.source]),
        )
        rows.setdefault(members[0].reason, []).append(row)
    return rows


def _split(parameter: str) -> tuple[str, str]:
    module, _, last = parameter.rpartition(".")
    return module, last


def _label(parameters: Sequence[str]) -> str:
    modules, lasts = zip(*map(_split, parameters), strict=True)
    different = list(dict.fromkeys(lasts))
    last = f"{{{','.join(different)}}}" if set(different) == set(_WEIGHT_AND_BIAS) else _wildcards(lasts)
    return ".".join(filter(None, (_wildcards(modules), last)))


def _digitless(text: str) -> str:
    return re.sub(r"\d+", "*", text)


def _wildcards(texts: Sequence[str]) -> str:
    """Texts that differ only in numbers as one pattern: the numbers that vary become `*`."""
    columns = zip(*(re.split(r"(\d+)", text) for text in texts), strict=True)
    return "".join(column[0] if len(set(column)) == 1 else "*" for column in columns)


def _sources(sources: Sequence[Source]) -> str:
    """`models.py:13,16`: at most three lines of each file."""
    lines: dict[str, list[int]] = {}
    for source in sources:
        known = lines.setdefault(source.name, [])
        if source.line not in known:
            known.append(source.line)
    shown = (
        f"{name}:{','.join(map(str, n[:_MOST_SOURCE_LINES]))}{',..' if len(n) > _MOST_SOURCE_LINES else ''}"
        for name, n in lines.items()
    )
    return " ".join(shown)
