"""A page as it is shown: its own text, what its blocks print, excerpts of files they wrote, tables.

Enters: the text of a page. Leaves: Markdown. Directives, each an HTML comment on a line of its own:
  excerpt: FILE /FROM/ /TO/   lines of a file that the page's commands wrote, from the first that fits a
                              regular expression to the line before the next that fits the other (without
                              /TO/: before the next comment or empty line)
  defaults: METHOD            the settings of a method, from its class
  methods                     all methods: curvature, cost, schedule, from their classes
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill

import torch

from kfac_fx.methods import METHODS
from pagetools.blocks import Block, PageError
from pagetools.runner import Page

_DIRECTIVE = re.compile(r"^(?P<indent> *)<!-- (?P<name>excerpt|defaults|methods)(: *(?P<value>.*?))? -->$")
_RANGE = re.compile(r"^(?P<file>\S+) /(?P<start>.+?)/( /(?P<end>.+?)/)?$")
_NEXT = r"^\s*(#.*)?$"
_LANGUAGES = {".py": "python", ".diff": "diff", ".json": "json"}
_LONGEST = 60  # lines of an output or an excerpt
_WIDTH = 110  # columns of a message


def rendered(text: str, *, page: str) -> str:
    """Run the page and put everything into it. Raises `PageError`."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run = Page(text, page=page, folder=folder)
        printed = run.run()
        return _filled(text, run.blocks, printed, folder=folder, page=page)


def _filled(
    text: str, blocks: tuple[Block, ...], printed: Mapping[int, str], *, folder: Path, page: str
) -> str:
    inside = {n for block in blocks for n in range(block.line, block.end + 1)}
    ends = {block.end: block for block in blocks}
    shown = []
    for number, line in enumerate(text.splitlines(), start=1):
        found = _DIRECTIVE.match(line)
        if found is not None and number not in inside:
            content = _directive(found["name"], found["value"] or "", folder, f"{page}:{number}")
            shown += [found["indent"] + part for part in content.splitlines()]
            continue
        shown.append(line)
        block = ends.get(number)
        if block is not None and printed.get(block.line, "").strip():
            fence = [
                "",
                "``` { .text .output }",
                *_shortened(_folded(printed[block.line].rstrip())),
                "```",
                "",
            ]
            shown += [" " * block.indent + part for part in fence]
    return "\n".join(shown) + "\n"


def _folded(text: str) -> str:
    """Messages of errors, one line each, as a terminal shows them."""
    lines = (fill(line, _WIDTH) if re.match(r"\w+Error: ", line) else line for line in text.splitlines())
    return "\n".join(lines)


def _shortened(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.splitlines()]
    if len(lines) <= _LONGEST:
        return lines
    return [*lines[: _LONGEST - 1], f"... ({len(lines) - _LONGEST + 1} more lines)"]


def _directive(name: str, value: str, folder: Path, place: str) -> str:
    if name == "excerpt":
        return _excerpt(value, folder, place)
    if name == "methods":
        return methods_table()
    if value not in METHODS:
        raise PageError(f"{place}: no method {value!r}.")
    return defaults_table(value)


def _excerpt(value: str, folder: Path, place: str) -> str:
    wanted = _RANGE.match(value)
    if wanted is None:
        raise PageError(f"{place}: an excerpt is `FILE /FROM/ /TO/`; got {value!r}.")
    file = folder / wanted["file"]
    if not file.is_file():
        written = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.*") if "examples" not in p.parts)
        raise PageError(f"{place}: nothing wrote {wanted['file']}; there are {written}.")
    lines = file.read_text(encoding="utf-8").splitlines()
    start = next((i for i, line in enumerate(lines) if re.search(wanted["start"], line)), None)
    if start is None:
        raise PageError(f"{place}: no line of {wanted['file']} fits /{wanted['start']}/.")
    after = (i for i, line in enumerate(lines) if i > start and re.search(wanted["end"] or _NEXT, line))
    chosen = lines[start : next(after, len(lines))]
    while chosen and not chosen[-1].strip():
        chosen.pop()
    kept = _shortened("\n".join(chosen))
    margin = min(len(line) - len(line.lstrip()) for line in kept if line.strip())
    if file.suffix == ".diff":
        margin = 0
    language = _LANGUAGES.get(file.suffix, "text")
    return "\n".join(
        [f'``` {{ .{language} title="{wanted["file"]}" }}', *(line[margin:] for line in kept), "```"]
    )


def defaults_table(name: str) -> str:
    """Settings and defaults of a method, then its base optimizer."""
    method = METHODS[name]
    rows = [f"| `{f.name}` | `{f.default!r}` |" for f in dataclasses.fields(method)]
    optimizer = method().base_optimizer([torch.nn.Parameter(torch.zeros(1))])
    shown = ("lr", "momentum", "betas", "eps", "weight_decay")
    settings = ", ".join(f"{k}={v}" for k, v in optimizer.defaults.items() if k in shown and v is not None)
    rows.append(f"| base optimizer | `{type(optimizer).__name__}({settings})` |")
    return "\n".join(["| setting | default |", "|---|---|", *rows])


def methods_table() -> str:
    """One row per method: what a layer stores and what each phase costs, each time it runs."""
    head = "| method | stored per layer | statistics | refresh | apply | every |"
    rows = []
    for name, method in METHODS.items():
        settings = method()
        every = f"{settings.statistics_every} / {settings.inverse_every or '-'}"
        cells = [f"[`{name}`]({name}.md)", _stored(method.stored), *map(_formula, method.costs), every]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


def _stored(text: str) -> str:
    """`what: how many; else` with the count as a formula."""
    what, _, rest = text.partition(": ")
    count, _, other = rest.partition("; ")
    return f"{what}: {_formula(count)}" + (f" ({other})" if other else "")


def _formula(cost: str) -> str:
    """A cost in d_A, d_G, n, m as TeX; a word as it is."""
    return cost if cost.isalpha() else f"${cost}$"
