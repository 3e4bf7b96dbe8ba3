"""Lines of a report as coloured pieces, and how they fit a width.

Enters: texts and cells. Leaves: lines, each a tuple of (text, role); `table` gives roles their colours, and
the plain text is the same pieces without. A width of None cuts and breaks nothing. Characters that do not
print, which names and lines of a model may hold, are escaped: a terminal would act on them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence

from kfac_fx.report.comments import in_comment

Line = tuple[tuple[str, str], ...]

GAP = "  "
CUT = ".."


def plain_text(lines: Iterable[Line]) -> str:
    """The lines without colour."""
    return "\n".join("".join(text for text, _ in line).rstrip() for line in lines)


def line(text: str, role: str = "") -> Line:
    """A line of one piece."""
    return ((in_comment(text), role),)


def broken(segments: Sequence[str], *, width: int | None, indent: int, role: str = "") -> list[Line]:
    """Segments in a row, three blanks apart; further lines are indented, segments break between words."""
    rows, current = [], ""
    for segment in map(in_comment, segments):
        wider = f"{current}   {segment}" if current.strip() else current + segment
        if current.strip() and width is not None and len(wider) > width:
            rows.append(current)
            wider = " " * indent + segment
        current = wider
    return [
        piece for row in [*rows, current] for piece in wrapped(row, width=width, indent=indent, role=role)
    ]


def wrapped(text: str, *, width: int | None, indent: int, role: str = "") -> list[Line]:
    """A text, broken between words; a single word that is too long is cut in pieces."""
    text = in_comment(text)
    if width is None or len(text) <= width:
        return [line(text, role)]
    width = max(width, indent + 10)
    pieces = textwrap.wrap(text, width, subsequent_indent=" " * indent, break_on_hyphens=False)
    return [line(piece, role) for piece in pieces]


def cut(text: str, width: int) -> str:
    """The text, without its end if it is too long."""
    return text if len(text) <= width else text[: max(width - len(CUT), 0)] + CUT[:width]


def cut_path(path: str, width: int) -> str:
    """The path, without its beginning if it is too long: the end tells layers apart."""
    return path if len(path) <= width else CUT[:width] + path[len(path) - max(width - len(CUT), 0) :]


def natural_widths(names: Sequence[str], cells: Iterable[Sequence[str]]) -> dict[str, int]:
    """Width of each column that cuts nothing. Without the columns that are empty below their name."""
    columns = zip(names, zip(*cells, strict=True), strict=True)
    widths = {name: max(map(len, column)) for name, column in columns if any(column)}
    return {name: max(width, len(name)) for name, width in widths.items()}


def total_width(widths: Mapping[str, int]) -> int:
    """Of columns of these widths, with the gaps between them."""
    return sum(widths.values()) + len(GAP) * (len(widths) - 1)


def fitted(
    widths: Mapping[str, int],
    width: int | None,
    *,
    shorten: Mapping[str, int],
    drop: Sequence[str],
    least: Mapping[str, int],
    drop_late: Sequence[str] = (),
) -> dict[str, int]:
    """Widths of the columns that fit, by name; each measure in turn, and only as far as it is needed.

    shorten: columns that are cut, not below this, else left out. drop: left out, in this order. drop_late:
    the same, once it does not fit even with the columns of `least` cut down to that; then these are cut.
    """
    found = dict(widths)
    if width is None:
        return found

    def excess() -> int:
        return total_width(found) - width

    for name, shortest in shorten.items():
        if name in found and excess() > 0:
            found[name] -= excess()
            if found[name] < shortest:
                del found[name]
    for name in drop:
        if name in found and excess() > 0:
            del found[name]
    slack = sum(max(found[name] - shortest, 0) for name, shortest in least.items() if name in found)
    for name in drop_late:
        if name in found and excess() > slack:
            del found[name]
    for name, shortest in least.items():
        if name in found and excess() > 0:
            found[name] = max(found[name] - excess(), min(found[name], shortest))
    return found
