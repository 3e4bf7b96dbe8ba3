"""What mkdocs calls: pages are run, formulas drawn, the site searched for files of other hosts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

sys.path.insert(0, str(Path(__file__).parents[1]))

from pagetools.blocks import PageError  # noqa: E402
from pagetools.formulas import with_mathml  # noqa: E402
from pagetools.offline import loaded_from_elsewhere  # noqa: E402
from pagetools.pages import rendered  # noqa: E402


def on_page_markdown(markdown: str, *, page: Any, **rest: Any) -> str:
    """The page with everything that its blocks print."""
    try:
        return rendered(markdown, page=page.file.src_uri)
    except PageError as error:
        raise PluginError(str(error)) from error


def on_page_content(html: str, *, page: Any, **rest: Any) -> str:
    """Formulas as MathML."""
    try:
        return with_mathml(html)
    except ValueError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error


def on_post_build(*, config: Any, **rest: Any) -> None:
    """Nothing of the site may be fetched from another host."""
    found = loaded_from_elsewhere(Path(config["site_dir"]))
    if found:
        raise PluginError("the site would load files from elsewhere:\n" + "\n".join(found))
