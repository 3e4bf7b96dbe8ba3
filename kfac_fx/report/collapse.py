"""Paths that differ only in integers, as patterns such as `layers.[0-3].experts.[0-7]`.

Enters: dotted paths. Leaves: patterns, each with the positions of the paths it stands for. Nothing here knows
what a path names.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence

Point = tuple[int, ...]
_MOST_AXES = 4


def template(path: str) -> tuple[str | None, ...]:
    """The components of a dotted path, None for each integer."""
    return tuple(None if part.isdecimal() else part for part in path.split("."))


def collapsed(paths: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Patterns that stand for exactly these paths, with positions in `paths`; in order of first appearance.

    A pattern is a box: every combination of the integers in its brackets is one of the paths.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, path in enumerate(paths):
        groups.setdefault(template(path), []).append(index)
    found = []
    for members in groups.values():
        places = {_point(paths[index]): index for index in members}
        for box in _boxes(frozenset(places)):
            inside = sorted(places[point] for point in box)
            found.append((spanned([paths[index] for index in inside]), inside))
    return sorted(found, key=lambda pattern: pattern[1][0])


def spanned(paths: Sequence[str]) -> str:
    """One pattern for paths of one template: `blocks.[0-1,3].qkv`.

    Integers in brackets combine freely with all others; a `*` stands for integers that do not.
    """
    points = frozenset(_point(path) for path in paths)
    parts, axis = [], 0
    for part in template(paths[0]):
        if part is None:
            parts.append(_axis_text(points, axis))
            axis += 1
        else:
            parts.append(part)
    return ".".join(parts)


def spans(numbers: Iterable[int]) -> str:
    """`{0, 1, 2, 5}` -> `0-2,5`; three numbers and more with equal steps, `{0, 3, 6, 9}`, -> `0-9:3`."""
    left, found = sorted(set(numbers)), []
    while left:
        step = left[1] - left[0] if len(left) > 1 else 1
        count = 1
        while count < len(left) and left[count] - left[count - 1] == step:
            count += 1
        if step > 1 and count < 3:
            count = 1
        first, last, left = left[0], left[count - 1], left[count:]
        found.append(f"{first}" if count == 1 else f"{first}-{last}" + (f":{step}" if step > 1 else ""))
    return ",".join(found)


def _point(path: str) -> Point:
    return tuple(int(part) for part in path.split(".") if part.isdecimal())


def _axis_text(points: frozenset[Point], axis: int) -> str:
    values = {point[axis] for point in points}
    if len(values) == 1:
        return str(values.pop())
    return f"[{spans(values)}]" if len(_by_rest(points, axis)) == 1 else "*"


def _by_rest(points: Iterable[Point], axis: int) -> dict[frozenset[Point], list[int]]:
    """The integers of one axis, grouped by the set of points that the other axes form beside them."""
    rests: dict[int, set[Point]] = {}
    for point in points:
        rests.setdefault(point[axis], set()).add(point[:axis] + point[axis + 1 :])
    groups: dict[frozenset[Point], list[int]] = {}
    for value, rest in rests.items():
        groups.setdefault(frozenset(rest), []).append(value)
    return groups


def _boxes(points: frozenset[Point]) -> list[list[Point]]:
    """The points as disjoint boxes, few of them: split along the axis that gives the fewest."""
    num_axes = len(next(iter(points)))
    sizes = [len({point[axis] for point in points}) for axis in range(num_axes)]
    if len(points) == math.prod(sizes):
        return [sorted(points)]
    axes = range(num_axes) if num_axes <= _MOST_AXES else [0]
    return min((_split(points, axis) for axis in axes), key=len)


def _split(points: frozenset[Point], axis: int) -> list[list[Point]]:
    found = []
    for rest, values in _by_rest(points, axis).items():
        for box in _boxes(rest):
            found.append([(*point[:axis], value, *point[axis:]) for value in values for point in box])
    return found
