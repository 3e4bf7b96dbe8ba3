"""A graph as Python that a person can read.

Enters: a GraphModule whose nodes may carry a label in `meta["kfac_fx"]`. Leaves: text that runs as Python:
what fx prints, without its bookkeeping (`; x = None`), each run of nodes under the user's source line, what a
pass inserted under a rule with its name and layer, labels above their nodes, one line per output, no path of
the user's machine. A line depends on its node and the one before alone, so that programs can be compared.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from kfac_fx.report.comments import in_comment
from kfac_fx.sources import user_source

WIDTH = 110
_ASSIGNMENT = re.compile(r'^(?P<indent> +)(?P<name>\w+)(: "[^"]*")? = ')
_ARGUMENT = re.compile(r"^ +(?P<name>\w+)(: [^#]*)?,$")
_RELEASE = re.compile(r";  (\w+ = )+None(?= *(#|$))")
_GLOBAL = re.compile(r"(?<![\w.])(device|inf|nan)\b(?! *=)")
_CLASS = re.compile(r"^ *class (?P<name>[^(]+)\(torch\.nn\.Module\):$")


def readable(module: GraphModule, *, title: str, notes: Sequence[str] = ()) -> str:
    """The graph of `module` as Python, under a header with `title`, the number of nodes and `notes`.

    Its outputs are named where `module.meta["kfac_fx_outputs"]` names them; inputs that nothing reads and
    that are in `module.meta["kfac_fx_unread"]` are left out.
    """
    unread = module.meta.get("kfac_fx_unread", frozenset())
    nodes = {"": _by_name(module)}
    for path, child in module.named_modules():
        if path and isinstance(child, GraphModule):
            nodes[path.rsplit(".", 1)[-1]] = _by_name(child)
    lines = list(_annotate(_printed(module).splitlines(), nodes, unread))
    outputs = module.graph.output_node().args[0]
    if lines and lines[-1].lstrip().startswith("return ") and isinstance(outputs, Sequence):
        lines[-1:] = _returned(outputs, module.meta.get("kfac_fx_outputs", ()))
    body = [piece for line in lines for piece in wrapped(line)]
    header = [
        f"# {in_comment(title)}",
        f"# {len(module.graph.nodes) - len(unread)} nodes",
        *(f"# {in_comment(note)}" for note in notes),
    ]
    return "\n".join([*header, *_imports(body), *body]) + "\n"


def _imports(lines: Sequence[str]) -> list[str]:
    """What the code reads by name, imported."""
    read = set(_GLOBAL.findall("\n".join(line.split("  #")[0] for line in lines)))
    return ["", "import torch", *([f"from torch import {', '.join(sorted(read))}"] if read else []), "", ""]


def _returned(outputs: Sequence[object], names: Sequence[str]) -> list[str]:
    """One line for each output, with what it is."""
    named = itertools.zip_longest(outputs, names[: len(outputs)], fillvalue="")
    lines = [f"            {output},{f'  # {in_comment(name)}' if name else ''}" for output, name in named]
    return ["", "        return (", *lines, "        )"]


def wrapped(line: str) -> list[str]:
    """A line of code, cut after commas inside brackets into pieces no longer than `WIDTH` where possible."""
    if len(line) <= WIDTH or line.lstrip().startswith("#"):
        return [line]
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    pieces, start, last = [], 0, 0
    room = WIDTH
    for end in [*_breaks(line), len(line)]:
        if end - start > room and last > start:
            pieces.append(line[start:last].strip())
            start, room = last, WIDTH - len(indent)
        last = end
    pieces.append(line[start:].strip())
    return [indent[4:] + pieces[0], *(indent + piece for piece in pieces[1:])]


def _by_name(module: GraphModule) -> dict[str, Node]:
    return {node.name: node for node in module.graph.nodes}


def _printed(module: GraphModule) -> str:
    """What this torch's `print_readable` gives, with one argument per line where it can."""
    known = inspect.signature(module.print_readable).parameters
    options: dict[str, Any] = {"print_output": False, "expanded_def": True}
    return module.print_readable(**{name: value for name, value in options.items() if name in known})


def _annotate(
    lines: list[str], nodes: Mapping[str, Mapping[str, Node]], unread: Collection[str]
) -> Iterator[str]:
    """Replace fx's comments by the user's source line where it changes, by rules and by our labels.

    unread: names of arguments to leave out.
    """
    current, last = nodes[""], _Place()
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        line = _RELEASE.sub("", line).rstrip()
        if opened := _CLASS.match(line):
            if not opened["name"].isidentifier():
                line = line.replace(opened["name"], "Program", 1)
            current, last = nodes.get(opened["name"], nodes[""]), _Place()
        elif found := _ASSIGNMENT.match(line):
            node = current.get(found["name"])
            if node is not None:
                place = _Place.of(node)
                yield from (f"{found['indent']}{text}" if text else "" for text in place.announced(last))
                last = place
        elif found := _ARGUMENT.match(line):
            if found["name"] in unread:
                continue
            node = current.get(found["name"])
            line += f"  # {in_comment(_label(node))}" if node is not None and _label(node) else ""
        yield line


@dataclass(frozen=True)
class _Place:
    """What is said above a node. section: pass and layer that inserted it, if one did."""

    section: str = ""
    origin: str = ""
    label: str = ""

    @staticmethod
    def of(node: Node) -> _Place:
        stage, layer = node.meta.get("kfac_fx_pass", ""), node.meta.get("kfac_fx_layer", "")
        return _Place(f"{stage}: {layer}" if layer else str(stage), _origin(node), _label(node))

    def announced(self, last: _Place) -> Iterator[str]:
        """What is new here."""
        if (self.section, self.origin) != (last.section, last.origin):
            yield ""
            if self.section != last.section and self.section:
                yield f"# {f'---- {in_comment(self.section)} ':-<{WIDTH - 10}}"
            if self.origin:
                yield f"# {in_comment(self.origin)}"
        if self.label and self != last:
            yield f"# kfac_fx: {in_comment(self.label)}"


def _label(node: Node) -> str:
    return str(node.meta.get("kfac_fx", ""))


def _origin(node: Node) -> str:
    """`models.py:13  code`: the user's line that the node comes from, or what else is known."""
    source = user_source(node.stack_trace)
    if source is not None:
        return f"{source}  {source.code}"
    if "kfac_fx_pass" in node.meta:
        return ""
    return "backward" if node.meta.get("kfac_fx_backward") else "no source line"


def _breaks(line: str) -> Iterator[int]:
    """Where a line may be cut: behind a bracket or a comma, inside brackets and outside string literals."""
    depth, quote = 0, ""
    for position, character in enumerate(line):
        if quote:
            quote = "" if character == quote and line[position - 1] != "\\" else quote
        elif character in "\"'":
            quote = character
        elif character == "#":
            return
        elif character in "([{":
            depth += 1
            yield position + 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth and line[position + 1 : position + 2] == " ":
            yield position + 2
