"""Commands of console blocks: which there are in a block, and what each prints when it is run.

Enters: one command line and the folder to run it in. Leaves: its output, or a `PageError`.

Importing torch takes seconds, so `kfac-fx` runs in this process, and `python FILE` in a fork of it: a process
of its own that has torch already, and that reads every module which lies beside the file anew.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import torch
from typer.testing import CliRunner

from kfac_fx_cli.main import app
from pagetools.blocks import Block, PageError

ROOT = Path(__file__).parents[2]
TIMEOUT = 120  # seconds
_TERMINAL = {"COLUMNS": "110", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
_FILES = ("cat", "head", "ls", "diff")


def commands_of(block: Block) -> tuple[str, ...]:
    """The lines that start with `$ `; of a block without any, all that are not comments."""
    lines = [line.split("  #")[0].rstrip() for line in block.code.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    prompted = [line[2:] for line in lines if line.startswith("$ ")]
    return tuple(prompted or lines)


def run(command: str, folder: Path, place: str, *, fails: bool = False) -> str:
    """What the command prints, run in `folder`. Raises `PageError` if it ends as it should not."""
    words = shlex.split(command)
    if words[0] == "kfac-fx":
        text, code = _run_ours(words[1:], folder)
    elif words[0] == "python":
        text, code = run_file(words[1:], folder)
    elif words[0] in _FILES:
        text, code = run_program(words, folder)
        code = 0 if words[0] == "diff" else code
    else:
        raise PageError(
            f"{place}: no rule runs the program {words[0]!r}; pagetools/small.py has more of them."
        )
    if (code != 0) is not fails:
        raise PageError(f"{place}: `{command}` ended with {code}:\n{text}")
    return text.replace(f"{folder}/", "").replace(str(folder), ".")


def run_program(
    words: list[str], folder: Path, environment: Mapping[str, str] | None = None
) -> tuple[str, int]:
    """Output of a program in a process of its own, with its messages if it fails, and its exit code."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **_TERMINAL, **(environment or {})}
    try:
        done = subprocess.run(
            words, cwd=folder, capture_output=True, encoding="utf-8", timeout=TIMEOUT, env=variables
        )
    except FileNotFoundError as error:
        return f"there is no {words[0]}: {error}\n", 127
    return done.stdout + (done.stderr if done.returncode else ""), done.returncode


def _run_ours(words: list[str], folder: Path) -> tuple[str, int]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        result = CliRunner(env=_TERMINAL).invoke(app, words)
    finally:
        os.chdir(before)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output, result.exit_code


def run_file(words: list[str], folder: Path) -> tuple[str, int]:
    """What `python WORDS` prints, and its exit code: in a fork where this process can be copied."""
    return forked(words, folder) if can_fork() else run_program([sys.executable, *words], folder)


def can_fork() -> bool:
    """Whether a copy of this process works: not on macOS, and not once CUDA has been used."""
    return sys.platform == "linux" and not torch.cuda.is_initialized()


def forked(words: list[str], folder: Path) -> tuple[str, int]:
    """What `python WORDS` prints, and its exit code, as `run_program` has them."""
    with _utf8() as out, _utf8() as err, _may_fork():
        files = (out.fileno(), err.fileno())
        process = multiprocessing.get_context("fork").Process(target=_as_main, args=(words, folder, files))
        process.start()
        process.join(TIMEOUT)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, TIMEOUT)
        out.seek(0)
        err.seek(0)
        return out.read() + (err.read() if code else ""), code


def _utf8() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8")


@contextlib.contextmanager
def _may_fork() -> Iterator[None]:
    """Without Python's warning that other threads are not copied: none of ours hold a lock."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded", category=DeprecationWarning)
        yield


def _as_main(words: list[str], folder: Path, files: tuple[int, int]) -> None:
    """In the new process: streams, arguments, path and modules as `python FILE` has them; then FILE."""
    os.dup2(files[0], 1)
    os.dup2(files[1], 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))
    os.chdir(folder)
    os.environ.update(_TERMINAL)
    torch.set_num_threads(1)
    beside = Path(words[0]).resolve().parent
    sys.argv, sys.path = words, [str(beside), *(place for place in sys.path if place != str(folder))]
    for name in list(sys.modules):
        first = name.partition(".")[0]
        if (beside / f"{first}.py").is_file() or (beside / first / "__init__.py").is_file():
            del sys.modules[name]
    runpy.run_path(words[0], run_name="__main__")
