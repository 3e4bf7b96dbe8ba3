"""A graph as Python that a person can read.

Enters: a GraphModule whose nodes may carry a label in `meta["kfac_fx"]`. Leaves: text that parses as Python:
what fx prints, without its bookkeeping (`; x = None`), each run of nodes under the user's source line, labels
above their nodes, no path of the user's machine.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch.fx import GraphModule, Node

from kfac_fx.graph import user_source

WIDTH = 110
_ASSIGNMENT = re.compile(r'^(?P<indent> +)(?P<name>\w+)(: "[^"]*")? = ')
_ARGUMENT = re.compile(r"^ +(?P<name>\w+)(: [^#]*)?,$")
_RELEASE = re.compile(r";  (\w+ = )+None(?= *(#|$))")
_CLASS = re.compile(r"^ *class (?P<name>[^(]+)\(torch\.nn\.Module\):$")


def readable(module: GraphModule, *, title: str) -> str:
    """The graph of `module` as Python, under a header with `title` and the number of nodes."""
    nodes = {"": _by_name(module)}
    for path, child in module.named_modules():
        if path and isinstance(child, GraphModule):
            nodes[path.rsplit(".", 1)[-1]] = _by_name(child)
    header = [f"# {title}", f"# {len(module.graph.nodes)} nodes", ""]
    lines = _annotate(_printed(module).splitlines(), nodes)
    return "\n".join([*header, *(piece for line in lines for piece in wrapped(line))]) + "\n"


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


def _annotate(lines: list[str], nodes: Mapping[str, Mapping[str, Node]]) -> Iterator[str]:
    """Replace fx's comments by the user's source line where it changes and by our labels."""
    current, place, purpose = nodes[""], "", ""
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        line = _RELEASE.sub("", line).rstrip()
        if opened := _CLASS.match(line):
            if not opened["name"].isidentifier():
                line = line.replace(opened["name"], "Program", 1)
            current, place, purpose = nodes.get(opened["name"], nodes[""]), "", ""
        elif found := _ASSIGNMENT.match(line):
            node = current.get(found["name"])
            if node is not None:
                if _origin(node) != place:
                    place = _origin(node)
                    yield from ("", f"{found['indent']}# {place}")
                if _label(node) not in ("", purpose):
                    yield f"{found['indent']}# kfac_fx: {_label(node)}"
                purpose = _label(node)
        elif found := _ARGUMENT.match(line):
            node = current.get(found["name"])
            line += f"  # {_label(node)}" if node is not None and _label(node) else ""
        yield line


def _label(node: Node) -> str:
    return str(node.meta.get("kfac_fx", ""))


def _origin(node: Node) -> str:
    """`models.py:13  code`: the user's line that the node comes from."""
    source = user_source(node.stack_trace)
    return f"{source}  {source.code}" if source else "no source line"


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
