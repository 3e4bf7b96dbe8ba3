"""The statements of a program: what fx prints, under the user's source lines and a rule for each layer.

Enters: a graph and the lines that fx prints of it. Leaves: lines. Tensors of 1 MiB and more are dropped after
their last use.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from torch import Tensor
from torch.fx import GraphModule, Node

from kfac_fx.export.layer_sections import quoted
from kfac_fx.report.comments import in_comment
from kfac_fx.report.program import WIDTH
from kfac_fx.sources import user_source

_LINE = re.compile(r"^ +(?P<code>(?P<name>\w+)(?: : \S+)? = .*?)(?:;  (?P<freed>(?:\w+ = )+)None)?$")
_KEYWORD = re.compile(r"([(,] ?)(\w+) = ")
_FULL_FLOAT32 = re.compile(r"torch\.ops\.kfac_fx\.(\w+)\.default\(")
_INSERTED = "inserted, "
_LARGE = 2**20


def body(module: GraphModule, lines: list[str], *, places: Mapping[str, str]) -> Iterator[str]:
    """What fx prints, under sources and rules. places: names of the constants, by attribute."""
    nodes = {node.name: node for node in module.graph.nodes}
    place = purpose = ""
    for line in lines:
        found = _LINE.match(line)
        if found is None or found["name"] not in nodes:
            continue
        node = nodes[found["name"]]
        label = str(node.meta.get("kfac_fx", ""))
        origin = _origin(node)
        if origin != place or _layer(label) != _layer(purpose):
            place = origin
            yield ""
            yield from [_rule(_layer(label))] if _layer(label) else []
            yield from [f"    # {in_comment(origin)}"] if origin else []
        if label not in ("", purpose) and not _layer(label):
            yield f"    # {in_comment(label)}"
        purpose = label
        yield _statement(node, found["code"], places)
        freed = [name for name in (found["freed"] or "").split(" = ") if name and _large(nodes[name])]
        if freed:
            yield f"    del {', '.join(freed)}"


def _statement(node: Node, code: str, places: Mapping[str, str]) -> str:
    """One line, with the shape of its value where there is room."""
    if node.op == "get_attr":
        return f"    {node.name} = constants[{quoted(places[str(node.target)])}]"
    code = _FULL_FLOAT32.sub(_in_full_float32, code)
    code = _KEYWORD.sub(r"\1\2=", code.replace("torch.ops.aten.", "aten."))
    value = node.meta.get("val")
    shape = f"  # {list(value.shape)}" if isinstance(value, Tensor) else ""
    line = f"    {code}"
    return line + shape if len(line + shape) <= WIDTH else line


def _in_full_float32(found: re.Match[str]) -> str:
    """The operator of torch's own that one of `precision` stands for."""
    name = found[1]
    return f"in_full_float32({name if name == 'convolution_weight' else f'aten.{name}.default'}, "


def _layer(label: str) -> str:
    """`A 10x10, G 16x16 of conv1` of the label of statistics, else nothing."""
    return label.removeprefix(_INSERTED) if label.startswith(_INSERTED) else ""


def _rule(text: str) -> str:
    text = in_comment(text)
    return f"    # ---- {text} {'-' * max(4, WIDTH - len(text) - 12)}"


def _origin(node: Node) -> str:
    """`models.py:13  code`: the user's line that the node comes from; empty for inserted nodes without."""
    source = user_source(node.stack_trace)
    if source is not None:
        return f"{source}  {source.code}"
    if _layer(str(node.meta.get("kfac_fx", ""))):
        return ""
    return "backward" if node.meta.get("kfac_fx_backward") else "no source line"


def _large(node: Node) -> bool:
    value = node.meta.get("val")
    if node.op == "placeholder" or not isinstance(value, Tensor):
        return False
    return math.prod(value.shape) * value.element_size() >= _LARGE
