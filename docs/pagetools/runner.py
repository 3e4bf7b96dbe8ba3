"""Runs a page: every Python block, every command, in order, in a folder of its own.

Enters: the text of a page. Leaves: what each block printed, by the line of its fence. Pages never contain
output that was typed in: the build shows what the blocks printed.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import linecache
import os
import random
import shutil
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from kfac_fx.errors import KfacFxError
from pagetools import commands, small
from pagetools.blocks import Block, PageError, blocks_of

ROOT = commands.ROOT


class Page:
    """One run of one page: its folder, the names that its Python blocks share, and what was printed."""

    def __init__(self, text: str, *, page: str, folder: Path) -> None:
        self.folder = folder
        self.blocks = blocks_of(text, page=page)
        self.name, self.text = str(folder / Path(page).name), text  # a full path: reports show its last part
        self.module = types.ModuleType("page")
        self.printed: dict[int, str] = {}
        (folder / "examples").symlink_to(ROOT / "examples")

    def run(self) -> Mapping[int, str]:
        """Run all blocks. Returns output by line of the fence. Raises `PageError` with the block's place."""
        lines = self.text.splitlines(keepends=True)
        linecache.cache[self.name] = (len(self.text), None, lines, self.name)
        sys.modules["page"] = self.module  # where type hints of classes in blocks are looked up
        try:
            with _inside(self.folder), _same_numbers(), _older_objects_left_alone():
                for block in self.blocks:
                    self._run(block)
        finally:
            del sys.modules["page"], linecache.cache[self.name]
        return self.printed

    def _run(self, block: Block) -> None:
        handlers: dict[str, Callable[[Block], str | None]] = {
            "python": self._python,
            "console": self._console,
            "bash": self._console,
            "text": self._text,
            "diff": self._diff,
            "json": self._json,
        }
        if block.title and block.language == "python":
            self._write(block)
            return
        printed = handlers[block.language](block)
        if printed is not None and "no output" not in block.markers:
            self.printed[block.line] = printed

    def _write(self, block: Block) -> None:
        path = self.folder / str(block.title)
        path.parent.mkdir(parents=True, exist_ok=True)
        compile(block.code, block.place, "exec")
        path.write_text(block.code, encoding="utf-8")

    def _python(self, block: Block) -> str:
        if block.small:
            raise PageError(f"{block.place}: Python blocks are run as they are.")
        code = "\n" * block.line + block.code  # lines are those of the page
        out, failed = io.StringIO(), None
        with contextlib.redirect_stdout(out):
            try:
                exec(compile(code, self.name, "exec"), self.module.__dict__)
            except KfacFxError as error:
                failed = f"{type(error).__name__}: {error}"
            except Exception as error:
                raise PageError(f"{block.place}: {traceback.format_exc(limit=-3)}") from error
        if (failed is not None) is not block.fails:
            raise PageError(f"{block.place}: {failed or 'raised nothing'}")
        return out.getvalue() + (f"{failed}\n" if failed else "")

    def _console(self, block: Block) -> str | None:
        found = commands.commands_of(block)
        if block.small:
            for command in found:
                small.run(command, self.folder, block.place)
            return None
        printed = [commands.run(c, self.folder, block.place, fails=block.fails) for c in found]
        return "\n".join(text.rstrip("\n") for text in printed) + "\n"

    def _text(self, block: Block) -> None:
        """Shown beside a command: the last block's output has to be the same."""
        if "layout" in block.markers:
            return
        last = max((line for line in self.printed if line < block.line), default=None)
        if last is None or not same_text(self.printed[last], block.code):
            got = None if last is None else self.printed[last]
            raise PageError(f"{block.place}: the block above prints another text:\n{got}")

    def _diff(self, block: Block) -> None:
        """A change of one file of the package, in a copy of it inside this page's folder."""
        if not block.title:
            raise PageError(f'{block.place}: a diff needs title="the file it changes".')
        if not (self.folder / "kfac_fx" / "__init__.py").exists():
            shutil.copytree(ROOT / "kfac_fx", self.folder / "kfac_fx", dirs_exist_ok=True)
        path = self.folder / block.title
        lines = block.code.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        text = path.read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise PageError(
                f"{block.place}: {block.title} has these lines {text.count(old)} times, not once."
            )
        path.write_text(text.replace(old, new), encoding="utf-8")

    def _json(self, block: Block) -> None:
        try:
            json.loads(block.code)
        except ValueError as error:
            raise PageError(f"{block.place}: {error}") from error


def same_text(printed: str, shown: str) -> bool:
    """Equal, lines' ends aside; `...` on a line of its own stands for any number of lines."""
    wanted = [line.rstrip() for line in shown.strip().splitlines()]
    got = [line.rstrip() for line in printed.strip().splitlines()]
    if "..." not in wanted:
        return wanted == got
    cut = wanted.index("...")
    head, tail = wanted[:cut], wanted[cut + 1 :]
    return got[: len(head)] == head and (not tail or got[-len(tail) :] == tail)


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """In the folder, which is first on Python's path; modules that were imported from it are forgotten."""
    place, path, known = Path.cwd(), list(sys.path), set(sys.modules)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        os.chdir(place)
        sys.path[:] = path
        for name in set(sys.modules) - known:
            file = vars(sys.modules[name]).get("__file__")
            if file and Path(file).is_relative_to(folder):
                del sys.modules[name]


@contextlib.contextmanager
def _older_objects_left_alone() -> Iterator[None]:
    """Collections of garbage do not walk over what torch and earlier tests keep; also not those of forks."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _same_numbers() -> Iterator[None]:
    """Pages print the same numbers whenever they run: seeds and one thread, put back afterwards."""
    threads, state, pythons = torch.get_num_threads(), torch.get_rng_state(), random.getstate()
    torch.manual_seed(0)
    random.seed(0)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
        random.setstate(pythons)
