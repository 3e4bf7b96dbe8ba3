"""Markdown text -> its fenced blocks, each with its language, its marker and its place.

Enters: the text of a page. Leaves: `Block`s in order. Runs nothing.

A marker is an HTML comment on the line above a fence; `;` separates several. Known markers:
  run small: REASON     console blocks: every command is run with smaller values (`small`), shows no output
  no output             the block runs, its output is not shown
  layout                a text block that shows a form, not the output of the block above it
  fails                 a command ends with another exit code than 0, or Python code raises `KfacFxError`
A title `title="file.py"` in the fence's line makes the runner write the block as that file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

LANGUAGES = frozenset({"python", "console", "text", "diff", "json", "bash"})
MARKERS = ("no output", "fails", "layout")
_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,}) *(?P<language>[\w+-]*)(?P<info>[^`]*)$")
_TITLE = re.compile(r'title="(?P<title>[^"]+)"')
_MARKER = re.compile(r"^\s*<!-- (?P<marker>.+?) -->\s*$")


class PageError(ValueError):
    """A page that breaks a rule, or a block that did not do what its page says."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block.

    line: of its fence, from 1. end: of its last line. indent: spaces before the fence.
    """

    page: str
    line: int
    end: int
    indent: int
    language: str
    title: str | None
    markers: tuple[str, ...]
    code: str

    @property
    def place(self) -> str:
        """`page.md:12`."""
        return f"{self.page}:{self.line}"

    @property
    def small(self) -> bool:
        """Whether its commands are run with smaller values than those shown."""
        return any(marker.startswith("run small:") for marker in self.markers)

    @property
    def fails(self) -> bool:
        """Whether the block has to end with an error."""
        return "fails" in self.markers


def blocks_of(text: str, *, page: str) -> tuple[Block, ...]:
    """All fenced blocks. Raises `PageError` for a block without a language, or of an unknown one."""
    return tuple(_blocks(text.splitlines(), page))


def _blocks(lines: list[str], page: str) -> Iterator[Block]:
    number = 0
    while number < len(lines):
        opened = _FENCE.match(lines[number])
        if opened is None:
            number += 1
            continue
        end = _closing(lines, number, opened["ticks"], page)
        language = opened["language"]
        if language not in LANGUAGES:
            known = ", ".join(sorted(LANGUAGES))
            raise PageError(f"{page}:{number + 1}: a block needs a language of {known}; it has {language!r}.")
        title = _TITLE.search(opened["info"])
        indent = len(opened["indent"])
        yield Block(
            page=page,
            line=number + 1,
            end=end + 1,
            indent=indent,
            language=language,
            title=title and title["title"],
            markers=_markers(lines, number, page),
            code="".join(f"{line[indent:]}\n" for line in lines[number + 1 : end]),
        )
        number = end + 1


def _closing(lines: list[str], start: int, ticks: str, page: str) -> int:
    for number in range(start + 1, len(lines)):
        if lines[number].strip() == ticks:
            return number
    raise PageError(f"{page}:{start + 1}: the block has no end.")


def _markers(lines: list[str], fence: int, page: str) -> tuple[str, ...]:
    found = _MARKER.match(lines[fence - 1]) if fence else None
    markers = tuple(part.strip() for part in found["marker"].split(";")) if found else ()
    for marker in markers:
        if marker not in MARKERS and not re.match(r"run small: *\S", marker):
            raise PageError(
                f"{page}:{fence}: no marker {marker!r}; known: {', '.join(MARKERS)}, run small: WHY."
            )
    return markers
