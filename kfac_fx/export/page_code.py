"""Programs as a page stores and addresses them: lines of nodes, and each text as changes of the one before.

Enters: texts that `report.program.readable` made. Leaves: line numbers by node name, and hunks. Nothing here
reads a plan.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from typing import TypeAlias

Span: TypeAlias = tuple[int, int]
Hunk: TypeAlias = tuple[int, int, int, int]

_ASSIGNED = re.compile(r'^( +)(\w+)(?:: "[^"]*")? = ')
_ARGUMENT = re.compile(r'^ +(\w+)(?:: "[^"]*")?,')


def node_lines(lines: Sequence[str]) -> dict[str, Span]:
    """First and last line (counted from 0, inclusive) of each node of the outermost program, by name."""
    found: dict[str, Span] = {}
    in_body, last = False, -1
    for number, line in enumerate(lines):
        if number <= last:
            continue
        if argument := None if in_body else _ARGUMENT.match(line):
            found.setdefault(argument[1], (number, number))
        elif line.strip().startswith(")") and line.endswith(":"):
            in_body = True
        elif " = " in line and (assigned := _ASSIGNED.match(line)):
            last = number
            while last + 1 < len(lines) and _continues(lines[last + 1], len(assigned[1])):
                last += 1
            found.setdefault(assigned[2], (number, last))
    return found


def merged(spans: Sequence[Span], lines: Sequence[str]) -> list[Span]:
    """The spans in order, joined where only comments and empty lines lie between, with the labels above."""
    joined: list[Span] = []
    for first, last in sorted(set(spans)):
        while first > 0 and lines[first - 1].lstrip().startswith("#"):
            first -= 1
        if joined and first <= joined[-1][1] + 2 and _is_quiet(lines[joined[-1][1] + 1 : first]):
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return joined


def hunks(old: Sequence[str], new: Sequence[str]) -> list[Hunk]:
    """Where two texts differ: lines `old[a:b]` became `new[c:d]`, in order.

    Lines that stand once in each text are aligned first, so that the time grows with the length of the texts
    and not with its square; what lies between two of them is compared from both ends.
    """
    found: list[Hunk] = []
    a = c = 0
    for b, d in [*_anchors(old, new), (len(old), len(new))]:
        while a < b and c < d and old[a] == new[c]:
            a, c = a + 1, c + 1
        end_old, end_new = b, d
        while end_old > a and end_new > c and old[end_old - 1] == new[end_new - 1]:
            end_old, end_new = end_old - 1, end_new - 1
        if end_old > a or end_new > c:
            found.append((a, end_old, c, end_new))
        a, c = b, d
    return found


def _anchors(old: Sequence[str], new: Sequence[str]) -> list[tuple[int, int]]:
    """The longest run of (place in old, place in new), growing in both, of lines that stand once in each."""
    places = _single(new)
    pairs = [(place, places[line]) for line, place in _single(old).items() if line in places]
    tails: list[int] = []
    heads: list[int] = []
    before: list[int] = []
    for index, (_, place) in enumerate(pairs):
        length = bisect.bisect_left(tails, place)
        before.append(heads[length - 1] if length else -1)
        tails[length : length + 1] = [place]
        heads[length : length + 1] = [index]
    chain, index = [], heads[-1] if heads else -1
    while index >= 0:
        chain.append(pairs[index])
        index = before[index]
    return chain[::-1]


def _single(lines: Sequence[str]) -> dict[str, int]:
    """Place of each line that stands once."""
    places: dict[str, int] = {}
    for number, line in enumerate(lines):
        places[line] = -1 if line in places else number
    return {line: place for line, place in places.items() if place >= 0}


def _continues(line: str, indent: int) -> bool:
    """Whether a line belongs to the statement above that stands at this indent."""
    return len(line) - len(line.lstrip()) > indent and not line.lstrip().startswith("#")


def _is_quiet(lines: Sequence[str]) -> bool:
    return all(not line.strip() or line.lstrip().startswith("#") for line in lines)
