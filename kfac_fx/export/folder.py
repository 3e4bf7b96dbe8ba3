"""All files of the folder, from one plan.

Each part of the folder is one function from a subject (plan, target and what they share) to contents by name.
Existing files of the same names are replaced; nothing else in the folder is touched.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from kfac_fx.errors import KfacFxError
from kfac_fx.export.environment import environment
from kfac_fx.export.page import pages
from kfac_fx.export.passes import passes
from kfac_fx.export.subject import Subject
from kfac_fx.export.train_step import train_step
from kfac_fx.planned import Plan
from kfac_fx.report.document import to_json
from kfac_fx.report.text import render
from kfac_fx.target import Target

Contents = Mapping[str, str | bytes]


def reports(subject: Subject) -> Contents:
    """What was printed, and the same as JSON."""
    return {"summary.txt": render(subject.plan) + "\n", "report.json": to_json(subject.plan) + "\n"}


PARTS: tuple[Callable[[Subject], Contents], ...] = (reports, environment, pages, passes, train_step)


def check_folder(folder: Path) -> None:
    """Raise `KfacFxError` if files cannot be written to this folder, which need not exist. Writes nothing."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        what = "a file" if there.exists() else "a link to nothing"
        problem = f"{'it' if there == folder else there} is {what}, not a folder"
    elif not os.access(there, os.W_OK | os.X_OK):
        problem = f"no permission to write{'' if there == folder else f' in {there}'}"
    else:
        return
    raise KfacFxError(f"cannot write to {folder}: {problem}. Choose another folder.")


def save(plan: Plan, target: Target, folder: Path) -> tuple[Path, ...]:
    """Write all parts. Returns the paths of what was written, in order.

    target: the model and batch that the plan was made of. A part that fails does not cost the others: its
    error is raised when they are written. Of several errors the first is raised, and each other is a warning.
    Raises `KfacFxError` if the folder cannot be written.
    """
    check_folder(folder)
    subject = Subject(plan=plan, target=target)
    written: list[Path] = []
    failures: list[tuple[str, Exception]] = []
    for part in PARTS:
        try:
            contents = part(subject)
        except Exception as error:
            failures.append((part.__name__, error))
        else:
            written += [_write(folder / name, content) for name, content in contents.items()]
    for name, error in failures[1:]:
        message = f"{name} was not written either: {type(error).__name__}: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    if failures:
        raise failures[0][1]
    return tuple(written)


def _write(path: Path, content: str | bytes) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise KfacFxError(f"cannot write {path}: {error.strerror}. Choose another folder.") from error
    return path
