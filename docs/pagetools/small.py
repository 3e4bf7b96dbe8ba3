"""Commands of blocks marked `run small: REASON`: as they stand they take minutes, or install things.

Enters: such a command. Leaves nothing, or a `PageError`. Each is executed in a copy of the repository, by the
program that it names:
  kfac-fx, python   with the options of SMALLER behind those of the page, and STAND_INS for its placeholders;
                    parts of a synopsis in brackets are given, all at once
  make              with --dry-run: it reads the Makefile, resolves the target, and prints its commands
  pip               with --dry-run, of this project alone: its metadata are built, nothing is installed
  git clone         of this repository, where it is one
  .ci/run           with a make that does dry runs
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from pagetools import commands
from pagetools.blocks import PageError
from pagetools.commands import ROOT

# First words of a command -> the options that make it short; the last of a repeated option counts.
SMALLER: Mapping[str, str] = {
    "kfac-fx bench": "--steps 1 --warmup 1",
    "kfac-fx bench TARGET": "--method kfac --inverse-every 2 --steps 1 --warmup 1",
    "kfac-fx spectrum": "--steps 1",
    "python examples/digits_conv.py": "--epochs 1",
    "python examples/digits_conv.py --epochs": "--epochs 0",
    "python tests/benchmarks/gram_time.py": "--geometry 2,1,4,1,1,0 --repeats 1 --threads 1",
    "python tests/benchmarks/inspect_time.py": "--layers 1 --experts 1 --repeats 1",
    "python tests/benchmarks/refresh_time.py": "--help",
    "python tests/benchmarks/stack_time.py": "--layers 6 --width 4 --repeats 1 --threads 1",
    "python tests/benchmarks/step_time.py": "--help",
}
STAND_INS: Mapping[str, str] = {
    "TARGET": "tiny.py",
    "examples/mnist_resnet.py": "tiny.py",
    "DIR": "out",
    "DIR_A": "out",
    "DIR_B": "out",
}
# Target of the Makefile -> what its commands have to contain.
MAKES: Mapping[str, str] = {
    "demo": "kfac-fx transform examples/digits_conv.py",
    "test": "python -m pytest",
    "docs": "mkdocs build --strict",
    "lint": "ruff check .",
    "format": "ruff format .",
}
TINY = """\
from collections import OrderedDict

import torch
from torch import nn


def build():
    model = nn.Sequential(OrderedDict(head=nn.Linear(3, 2)))
    return model, nn.functional.cross_entropy, torch.randn(4, 3), torch.randint(2, (4,))
"""


def run(command: str, folder: Path, place: str) -> None:
    """Run the command small. `folder`: of the page; the copy of the repository is made inside it."""
    handlers: dict[str, Callable[[list[str], Path, str], None]] = {
        "kfac-fx": _ours,
        "python": _ours,
        "make": _make,
        "pip": _pip,
        "git": _clone,
        "cd": _cd,
        ".ci/run": _ci,
    }
    for part in command.split(" && "):
        words = shlex.split(re.sub(r"[\[\]]", "", part) if part.startswith("kfac-fx") else part)
        if words[0] not in handlers:
            raise PageError(f"{place}: no rule runs the program {words[0]!r}.")
        handlers[words[0]](words, _repository(folder), f"{place}: {command}")


def options_for(command: str) -> list[str]:
    """What SMALLER adds to a command; its longest entry that fits counts."""
    fitting = [start for start in SMALLER if f"{command} ".startswith(f"{start} ")]
    return shlex.split(SMALLER[max(fitting, key=len)]) if fitting else []


def _repository(folder: Path) -> Path:
    """The files that these commands read, as they are in the working tree, and their TARGET."""
    copy = folder / "repository"
    if not copy.exists():
        copy.mkdir()
        for file in filter(Path.is_file, ROOT.iterdir()):
            shutil.copy2(file, copy)
        for room in ("kfac_fx", "cli", "examples", "tests/benchmarks", ".ci"):
            shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "tiny.py").write_text(TINY, encoding="utf-8")
    return copy


def _ours(words: list[str], folder: Path, place: str) -> None:
    more = options_for(" ".join(words))
    for word in words[1:]:
        if word.endswith(".py") and not (ROOT / word).is_file():
            raise PageError(f"{place}: there is no {word}.")
    command = shlex.join([STAND_INS.get(word, word) for word in words] + more)
    printed = commands.run(command, folder, place)
    unknown = [w for w in words if w.startswith("--") and not re.search(rf"{w}\b", printed)]
    if "--help" in more and unknown:
        raise PageError(f"{place}: its --help has no option {', '.join(unknown)}.")


def _make(words: list[str], folder: Path, place: str) -> None:
    printed = _program(["make", "--dry-run", *words[1:]], folder, place)
    for target in words[1:]:
        if target not in MAKES:
            raise PageError(f"{place}: pagetools/small.py does not say what `make {target}` has to run.")
        _has(printed, MAKES[target], place)


def _pip(words: list[str], folder: Path, place: str) -> None:
    text = (folder / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    extras = re.findall(r"^(\w+) = \[", text.split("\n[")[0], re.MULTILINE)
    for name in re.findall(r"\w+", "".join(re.findall(r"\.\[([\w,]+)\]", " ".join(words)))):
        if name not in extras:  # pip only warns, and not even that without dependencies
            raise PageError(f"{place}: pyproject.toml has no extra {name!r}.")
    pip = [sys.executable, "-m", *words]
    printed = _program([*pip, "--dry-run", "--no-deps", "--no-index", "--no-build-isolation"], folder, place)
    _has(printed, "Would install kfac_fx", place)


def _clone(words: list[str], folder: Path, place: str) -> None:
    if words[1:] != ["clone", "<this", "repository>"]:
        raise PageError(f"{place}: no rule runs `{shlex.join(words)}`.")
    top, code = commands.run_program(["git", "-C", str(ROOT), "rev-parse", "--show-toplevel"], folder)
    if code == 0 and Path(top.strip()) == ROOT:  # an unpacked archive cannot be cloned
        clone = str(folder.parent / "clone" / "kfac_fx")
        _program(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", clone], folder, place)
        assert (Path(clone) / "Makefile").is_file(), clone


def _cd(words: list[str], folder: Path, place: str) -> None:
    """Into what was cloned: commands after it run in the copy, which has changes that are not committed."""
    clones = folder.parent / "clone"
    if clones.exists() and not (clones / words[1]).is_dir():
        raise PageError(f"{place}: there is no folder {words[1]}.")


def _ci(words: list[str], folder: Path, place: str) -> None:
    printed = _program([str(folder / ".ci" / "run")], folder, place, MAKEFLAGS="--dry-run")
    for part in (MAKES["test"], MAKES["docs"], MAKES["lint"], "ruff format --check", "pyright"):
        _has(printed, part, place)


def _program(words: list[str], folder: Path, place: str, **environment: str) -> str:
    """What it prints. Flags of a make that runs these tests are not handed on."""
    flags = {name: "" for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL") if name in os.environ}
    printed, code = commands.run_program(words, folder, {**flags, **environment})
    if code != 0:
        raise PageError(f"{place}: `{shlex.join(words)}` ended with {code}:\n{printed}")
    return printed


def _has(printed: str, part: str, place: str) -> None:
    if part not in printed:
        raise PageError(f"{place}: what it prints has no {part!r}:\n{printed}")
