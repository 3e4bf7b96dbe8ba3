"""The report of a `Verification` in a terminal, through rich: the lines of `text` in colour."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from kfac_fx.verification.records import Verification
from kfac_fx.verification.text import styled_lines


def show(verification: Verification, console: Console) -> None:
    """Print the report; long lines are wrapped by the terminal."""
    for line, style in styled_lines(verification):
        console.print(Text(line, style=style), soft_wrap=True, highlight=False)
