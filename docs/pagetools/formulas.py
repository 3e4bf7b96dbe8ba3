"""TeX of the pages -> MathML, which browsers draw without any script or font of another place.

Enters: HTML in which `pymdownx.arithmatex` has marked the formulas. Leaves: HTML with `<math>` elements.
"""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
_LOST = re.compile(r"<mtext>\\|\\[A-Za-z]{2,}")  # a command that the converter did not know


def with_mathml(page: str) -> str:
    """The page with every formula written as MathML. Raises `ValueError` for TeX that cannot be converted."""
    return _FORMULA.sub(_converted, page)


def _converted(found: re.Match[str]) -> str:
    tex = html.unescape(found["tex"]).strip()
    block = found["open"] == "["
    maths = convert(tex, display="block" if block else "inline")
    if _LOST.search(maths):
        raise ValueError(f"a formula has a command that is not known: {tex}")
    return f'<div class="formula">{maths}</div>' if block else maths
