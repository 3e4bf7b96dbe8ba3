"""All files of the folder, from one plan.

Each part of the folder is one function from a plan (and the user's target) to contents by name. Existing
files of the same names are replaced; nothing else in the folder is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from kfac_fx.contracts import Plan
from kfac_fx.errors import KfacFxError
from kfac_fx.export.environment import environment
from kfac_fx.export.page import pages
from kfac_fx.export.passes import passes
from kfac_fx.export.train_step import train_step
from kfac_fx.report.document import to_json
from kfac_fx.report.text import render
from kfac_fx.target import Target

Contents = Mapping[str, str | bytes]


def reports(plan: Plan, target: Target) -> Contents:
    """What was printed, and the same as JSON."""
    return {"summary.txt": render(plan) + "\n", "report.json": to_json(plan) + "\n"}


PARTS: tuple[Callable[[Plan, Target], Contents], ...] = (reports, environment, pages, passes, train_step)


def save(plan: Plan, target: Target, folder: Path) -> tuple[Path, ...]:
    """Write all parts. Returns the paths, in order.

    target: the model and batch that the plan was made of. Raises `KfacFxError` if the folder cannot be
    written.
    """
    contents = {name: content for part in PARTS for name, content in part(plan, target).items()}
    try:
        for name, content in contents.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise KfacFxError(f"cannot write to {folder}: {error.strerror}. Choose another folder.") from error
    return tuple(folder / name for name in contents)
