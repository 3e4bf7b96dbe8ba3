"""The built site must work without a network: nothing that a page loads may lie elsewhere.

Enters: the folder of a built site. Leaves: what its files load from other hosts. Links to follow are free.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

_LOADS = {
    "script": ("src",),
    "img": ("src", "srcset"),
    "iframe": ("src",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "audio": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
}
_LOADING_LINKS = {"stylesheet", "preload", "preconnect", "dns-prefetch", "icon", "modulepreload", "manifest"}
_IN_STYLE = re.compile(r"(?:url\(\s*['\"]?|@import\s+['\"])((?:https?:)?//[^'\")\s]+)")


class _Loads(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Attributes that make a browser fetch something."""
        values = dict(attrs)
        names = _LOADS.get(tag, ())
        if tag == "link" and _LOADING_LINKS & set((values.get("rel") or "").split()):
            names = ("href",)
        self.found += [str(values[name]) for name in names if _elsewhere(values.get(name))]
        self.found += _IN_STYLE.findall(values.get("style") or "")

    handle_startendtag = handle_starttag


def _elsewhere(address: str | None) -> bool:
    return bool(address) and re.match(r"(https?:)?//", str(address).strip()) is not None


def loaded_from_elsewhere(site: Path) -> list[str]:
    """`file: address` of everything that the pages and styles of this site would fetch from another host."""
    found = []
    for file in sorted(site.rglob("*")):
        if file.suffix == ".html":
            parser = _Loads()
            text = file.read_text(encoding="utf-8")
            parser.feed(text)
            styles = re.findall(r"<style.*?</style>", text, re.DOTALL)
            addresses = parser.found + [a for style in styles for a in _IN_STYLE.findall(style)]
        elif file.suffix == ".css":
            addresses = _IN_STYLE.findall(file.read_text(encoding="utf-8"))
        else:
            continue
        found += [f"{file.relative_to(site)}: {address}" for address in addresses]
    return found
