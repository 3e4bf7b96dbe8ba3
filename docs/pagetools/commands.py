"""Commands of console blocks: which program they call, whether their options exist, what they print.

Enters: one command line. Leaves: its output, or a `PageError` that says what does not exist.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer.main
from typer.testing import CliRunner

from kfac_fx_cli.main import app
from pagetools.blocks import Block, PageError

ROOT = Path(__file__).parents[2]
_WORDS = re.compile(r"[A-Z]{3,}|<[^>]+>")  # placeholders of a synopsis: TARGET, DIR


def commands_of(block: Block) -> tuple[str, ...]:
    """The lines that start with `$ `; of a block without any, all that are not comments."""
    lines = [line.split("  #")[0].rstrip() for line in block.code.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    prompted = [line[2:] for line in lines if line.startswith("$ ")]
    return tuple(prompted or lines)


def check(command: str, place: str) -> None:
    """Whether the program and every option of the command exist; nothing is run."""
    for part in re.split(r" && | \| ", command):
        words = shlex.split(re.sub(r"[\[\]]", "", part))
        while words and re.fullmatch(r"\w+=\S*", words[0]):
            words = words[1:]
        known = {
            "kfac-fx": _check_ours,
            "make": _check_make,
            "python": _check_script,
            "pip": _check_pip,
            ".ci/run": _check_file,
            "git": _nothing,
            "cd": _nothing,
        }
        name = Path(words[0]).name if "bin/" in words[0] else words[0]
        if name in ("mkdocs", "pytest", "pre-commit", "tensorboard"):
            continue
        if name not in known:
            raise PageError(f"{place}: no rule checks the program {name!r}.")
        known[name](words[1:], f"{place}: {command}")


def run(command: str, folder: Path, place: str, *, fails: bool = False) -> str:
    """What the command prints, run in `folder`; `kfac-fx` in this process, `python` in its own."""
    words = shlex.split(command)
    if words[0] == "kfac-fx":
        text, code = _run_ours(words[1:], folder)
    elif words[0] == "python":
        text, code = _run_python(words[1:], folder)
    elif words[0] in ("cat", "head", "ls", "diff"):
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60)
        text, code = done.stdout + done.stderr, 0 if words[0] == "diff" else done.returncode
    else:
        raise PageError(f"{place}: {words[0]!r} is not run; mark the block `parsed only: REASON`.")
    if (code != 0) is not fails:
        raise PageError(f"{place}: `{command}` ended with {code}:\n{text}")
    return text.replace(f"{folder}/", "").replace(str(folder), ".")


def _run_ours(words: list[str], folder: Path) -> tuple[str, int]:
    before, width = Path.cwd(), {"COLUMNS": "110", "NO_COLOR": "1"}
    os.chdir(folder)
    try:
        result = CliRunner(env=width).invoke(app, words)
    finally:
        os.chdir(before)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output, result.exit_code


def _run_python(words: list[str], folder: Path) -> tuple[str, int]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "110"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=120, env=environment
    )
    return done.stdout + (done.stderr if done.returncode else ""), done.returncode


def _check_ours(words: list[str], place: str) -> None:
    group: Any = typer.main.get_command(app)
    if words and words[0] == "--help":
        return
    if not words or words[0] not in group.commands:
        raise PageError(f"{place}: kfac-fx has no command {words[:1]}; it has {sorted(group.commands)}.")
    options = {name: param for param in group.commands[words[0]].params for name in param.opts}
    needed = sum(param.required and not param.opts[0].startswith("-") for param in options.values())
    given, rest = 0, list(words[1:])
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            given += 1
            continue
        name, _, value = word.partition("=")
        if name not in options:
            raise PageError(f"{place}: kfac-fx {words[0]} has no option {name}.")
        if not options[name].is_flag and not value and rest:
            rest.pop(0)
    if given < needed:
        raise PageError(f"{place}: kfac-fx {words[0]} needs {needed} arguments.")


def _check_make(words: list[str], place: str) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in words:
        if "=" not in word and word not in targets:
            raise PageError(f"{place}: the Makefile has no target {word!r}.")


def _check_script(words: list[str], place: str) -> None:
    if words[:1] == ["-m"]:
        return
    path = ROOT / words[0]
    if not path.is_file():
        if words[0].startswith(("build/", "DIR/")):
            return
        raise PageError(f"{place}: {words[0]} does not exist.")
    texts = [path.read_text(), *(file.read_text() for file in path.parent.glob("*.py"))]
    for option in words[1:]:
        if option.startswith("--") and option != "--help" and not any(f'"{option}"' in t for t in texts):
            raise PageError(f"{place}: {words[0]} has no option {option}.")


def _check_pip(words: list[str], place: str) -> None:
    section = (
        (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    )
    extras = re.findall(r"^(\w+) = \[", section, re.MULTILINE)
    for name in re.findall(r"\.\[([\w,]+)\]", " ".join(words)) + _brackets_lost(words):
        for extra in name.split(","):
            if extra not in extras:
                raise PageError(f"{place}: pyproject.toml has no extra {extra!r}.")


def _brackets_lost(words: list[str]) -> list[str]:
    return [word[1:] for word in words if re.fullmatch(r"\.[\w,]+", word)]


def _check_file(words: list[str], place: str) -> None:
    if not (ROOT / ".ci" / "run").is_file():
        raise PageError(f"{place}: .ci/run does not exist.")


def _nothing(words: list[str], place: str) -> None:
    """Programs that are not ours."""
