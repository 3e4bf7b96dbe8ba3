"""A file that a command is to write: whether it can, asked before the work, and the error if it then cannot.

Enters: a path. Leaves: nothing but the file. A check leaves neither files nor folders.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

from kfac_fx.errors import KfacFxError


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check_writable(file: Path, *, endings: Sequence[str]) -> None:
    """Raise `KfacFxError` if the file cannot be written, or its name has none of `endings`.

    All but .json are drawn by matplotlib, which must be installed for them.
    """
    if file.suffix not in endings:
        listed = ", ".join(endings[:-1]) + " or " + endings[-1] if len(endings) > 1 else endings[0]
        raise KfacFxError(f"cannot write {file}: its name must end in {listed}.")
    if file.suffix != ".json" and not can_draw():
        raise KfacFxError(
            f'cannot draw {file}: matplotlib is not installed. Run pip install "matplotlib>=3.8", or name a '
            ".json file."
        )
    there = file.exists()
    missing = [folder for folder in file.parents if not folder.exists()]  # deepest first
    try:
        with writing(file):
            file.open("a", encoding="utf-8").close()
            if not there:
                file.unlink()
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # was not made, or somebody else writes into it by now
                folder.rmdir()


@contextlib.contextmanager
def writing(file: Path) -> Iterator[None]:
    """Inside, `file` is written; its folder is made. Raises `KfacFxError` where the system refuses."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise KfacFxError(f"cannot write {file}: {error.strerror}. Choose another file.") from error
