"""Pieces of the strip: texts, rectangles, and what all rows share.

Enters: places in pixels, and texts that may hold any character. Leaves: elements of SVG as strings.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import final

from kfac_fx.report.comments import in_comment

BAR = 62
MONO, PROPORTIONAL = 6.7, 6.2  # pixels of a character, on average


def escaped(text: str) -> str:
    """On one line, as XML may hold it: characters that do not print, so the forbidden ones, spelled out."""
    return escape(in_comment(text))


def cut(text: str, room: int) -> str:
    """The text, without its end if it is longer than `room` characters."""
    return text if len(text) <= room else f"{text[: room - 2]}.."


@final
@dataclass(frozen=True, kw_only=True)
class Frame:
    """What all rows share.

    width: of the drawing. shift: pixels by which the columns beside the labels stand further left, since the
    labels are short. page: the file of the links. largest: dimension. most: state and work of a row.
    """

    width: int
    shift: int
    page: str
    largest: int
    most: tuple[float, float]

    def beside(self, cells: str) -> str:
        """The cells, moved."""
        return f'<g transform="translate({-self.shift} 0)">{cells}</g>'

    def open_text(self, x: float, y: float, text: str, css: str) -> str:
        """A text without a neighbour at its right: cut to the drawing's width, whole in `data-full`."""
        room = int((self.width + self.shift - x - 8) / (MONO if "mono" in css else PROPORTIONAL))
        full = f' data-full="{escaped(text)}"' if text else ""
        shown = escaped(cut(text, room))
        return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}"{full} xml:space="preserve">{shown}</text>'


def text_at(x: float, y: float, text: str, css: str, *, place: str = "") -> str:
    """A text. place: `text-anchor`."""
    anchor = f' text-anchor="{place}"' if place else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}"{anchor} xml:space="preserve">{escaped(text)}</text>'


def rect(css: str, x: float, y: float, width: float, height: float, opacity: float) -> str:
    """A rectangle around (x, y)."""
    fade = f' opacity="{opacity}"' if opacity < 1 else ""
    return (
        f'<rect class="{css}" x="{x - width / 2:.1f}" y="{y - height / 2:.1f}" '
        f'width="{width:.1f}" height="{height:.1f}"{fade}/>'
    )


def bar(x: float, middle: float, share: float) -> str:
    """A bar for a share of the largest, from x to the right."""
    return f'<rect class="bar" x="{x}" y="{middle - 4:.1f}" width="{max(share * BAR, 0.5):.1f}" height="8"/>'
