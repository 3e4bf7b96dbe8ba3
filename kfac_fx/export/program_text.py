"""A rewritten program as a Python function of named parameters, buffers and batch.

Enters: a `Program`. Leaves: lines that run as they are, each run of operators under the user's source line,
with a rule where the statistics of a layer start. Tensors of 1 MiB and more are dropped after their last use.
"""

from __future__ import annotations

import math
import operator
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kfac_fx import graph as fxgraph
from kfac_fx.contracts import Plan
from kfac_fx.errors import ExportError
from kfac_fx.export.layer_sections import quoted, statistic_variable, variable
from kfac_fx.graph import user_source
from kfac_fx.instrument import Program
from kfac_fx.lower import in_full_float32
from kfac_fx.report.program import WIDTH

_LINE = re.compile(r"^ +(?P<code>(?P<name>\w+)(?: : \S+)? = .*?)(?:;  (?P<freed>(?:\w+ = )+)None)?$")
_KEYWORD = re.compile(r"([(,] ?)(\w+) = ")
_FULL_FLOAT32 = re.compile(r"torch\.ops\.kfac_fx\.(\w+)\.default\(")
_INSERTED = "inserted, "
_LARGE = 2**20
_NAMESPACES = ("aten", "prims", "prim", "kfac_fx")  # the last are those of `precision`
SIGNATURE = (
    "    parameters: Mapping[str, Tensor],",
    "    buffers: Mapping[str, Tensor],",
    "    constants: Mapping[str, Tensor],",
    "    batch: Mapping[str, Tensor],",
    "    curvature: Mapping[str, Mapping[str, Tensor]],",
)


@final
@dataclass(frozen=True, kw_only=True)
class ProgramText:
    """text: of the function. constants: tensors that it reads, by name. names: imports of its literals.
    helpers: functions of `runtime` that it calls.
    """

    text: str
    constants: Mapping[str, Tensor]
    names: frozenset[str]
    helpers: frozenset[str]


def program_text(
    plan: Plan, program: Program, *, name: str, summary: str, known: Mapping[str, Tensor]
) -> ProgramText:
    """The program as function `name`. Its variables are renamed in `program`.

    known: constants of other programs, whose names are taken. Raises `ExportError` if it calls what only
    another package knows.
    """
    module = _as_run(program.module)
    _check(module)
    backward = frozenset(node.name for node in plan.capture.backward)
    backward = frozenset(node for node in module.graph.nodes if node.name in backward)
    returned = _name_outputs(program, module)
    places, constants = _constants(module, known)
    code = module.graph.python_code("self", verbose=False)
    lines = [
        f"def {name}(",
        *SIGNATURE,
        ") -> tuple[Any, ...]:",
        f'    """{summary}"""',
        *_arguments(plan, program, module),
        *_body(module, code.src.splitlines(), places=places, backward=backward),
        "",
        *_result(program, returned),
    ]
    text = "\n".join(piece for line in lines for piece in _fitted(line))
    literals = ("device", "inf", "nan")
    return ProgramText(
        text=text,
        constants=constants,
        helpers=frozenset(n for n in ("in_full_float32", "convolution_weight") if n in text),
        names=frozenset(n for n in literals if re.search(rf"(?<![\w.]){n}\b", text)),
    )


def _as_run(module: GraphModule) -> GraphModule:
    """The program as `lower` makes it for its device, in eager mode."""
    on_cuda = fxgraph.value(module.graph.output_node().all_input_nodes[0]).is_cuda
    return in_full_float32(module) if on_cuda else module


def _check(module: GraphModule) -> None:
    for node in module.graph.nodes:
        if node.op == "call_module":
            raise ExportError(f"the program calls the module {node.target}, which is no tensor operation.")
        if node.op == "call_function" and node.target is not operator.getitem:
            if str(node.target).split(".")[0] not in _NAMESPACES:
                source = user_source(node.stack_trace)
                raise ExportError(
                    f"the program calls {node.target}{f' ({source})' if source else ''}, which torch alone "
                    "does not know: a file that imports nothing but torch cannot run it."
                )


def _constant(module: GraphModule, target: str) -> Tensor:
    found: Any = module
    for part in target.split("."):
        found = vars(found).get(part, None) if part in vars(found) else found.__getattr__(part)
    if not isinstance(found, Tensor):
        raise ExportError(f"the program holds a {type(found).__name__} ({target}), not only tensors.")
    return found.detach()


def _constants(module: GraphModule, known: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(name of each attribute that the program reads, constants by name); equal ones share a name."""
    places: dict[str, str] = {}
    constants = dict(known)
    for node in module.graph.find_nodes(op="get_attr"):
        target = str(node.target)
        value, name, number = _constant(module, target), target.strip("_"), 2
        while name in constants and not _same(constants[name], value):
            name, number = f"{target.strip('_')}_{number}", number + 1
        places[target], constants[name] = name, value
    return places, constants


def _same(first: Tensor, second: Tensor) -> bool:
    alike = (first.dtype, first.device, first.shape) == (second.dtype, second.device, second.shape)
    return alike and torch.equal(first, second)


def _name_outputs(program: Program, module: GraphModule) -> list[Node]:
    """Name what the program returns; the nodes in order."""
    (returned,) = module.graph.output_node().args
    nodes = list(returned)  # type: ignore[arg-type]
    names = ["loss", "inverse_scale", "check"]
    names += [f"gradient_of_{variable(name)}" for name in program.gradients]
    names += [statistic_variable(key, name) for key, name in program.state_outputs]
    renamed: set[Node] = set()
    for node, name in zip(nodes, names, strict=True):
        if isinstance(node, Node) and node.op != "placeholder" and node not in renamed:
            node._rename(name)
            renamed.add(node)
    return nodes


def _arguments(plan: Plan, program: Program, module: GraphModule) -> Iterator[str]:
    """One line for each placeholder that is read."""
    capture = plan.capture
    places = [f"parameters[{quoted(p.name)}]" for p in capture.parameters]
    places += [f"buffers[{quoted(name)}]" for name in capture.buffers]
    places += [f"batch[{quoted(str(node.target))}]" for node in (*capture.inputs, *capture.targets)]
    places += [f"curvature[{quoted(owner)}][{quoted(name)}]" for owner, name in program.state_inputs]
    nodes = module.graph.find_nodes(op="placeholder")
    for node, place in zip(nodes, places, strict=True):
        if node.users:
            yield f"    {node.name} = {place}"


def _body(
    module: GraphModule, lines: list[str], *, places: Mapping[str, str], backward: frozenset[Node]
) -> Iterator[str]:
    """What fx prints, under sources and rules. places: names of the constants, by attribute."""
    nodes = {node.name: node for node in module.graph.nodes}
    place = purpose = ""
    for line in lines:
        found = _LINE.match(line)
        if found is None or found["name"] not in nodes:
            continue
        node = nodes[found["name"]]
        label = str(node.meta.get("kfac_fx", ""))
        origin = _origin(node, backward)
        if origin != place or _layer(label) != _layer(purpose):
            place = origin
            yield ""
            yield from [_rule(_layer(label))] if _layer(label) else []
            yield from [f"    # {origin}"] if origin else []
        if label not in ("", purpose) and not _layer(label):
            yield f"    # {label}"
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


def _fitted(line: str) -> Iterator[str]:
    """A call that is too long for one line, with its arguments on lines of their own."""
    opening = line.find("(")
    if len(line) <= WIDTH or opening < 0 or not line.endswith(")") or line.lstrip().startswith("#"):
        yield line
        return
    indent = " " * (len(line) - len(line.lstrip()))
    yield line[: opening + 1]
    yield from textwrap.wrap(
        line[opening + 1 : -1],
        WIDTH,
        initial_indent=indent + "    ",
        subsequent_indent=indent + "    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    yield f"{indent})"


def _layer(label: str) -> str:
    """`A 10x10, G 16x16 of conv1` of the label of statistics, else nothing."""
    return label.removeprefix(_INSERTED) if label.startswith(_INSERTED) else ""


def _rule(text: str) -> str:
    return f"    # ---- {text} {'-' * max(4, WIDTH - len(text) - 12)}"


def _origin(node: Node, backward: frozenset[Node]) -> str:
    """`models.py:13  code`: the user's line that the node comes from; empty for inserted nodes without."""
    source = user_source(node.stack_trace)
    if source is not None:
        return f"{source}  {source.code}"
    if _layer(str(node.meta.get("kfac_fx", ""))):
        return ""
    return "backward" if node in backward else "no source line"


def _large(node: Node) -> bool:
    value = node.meta.get("val")
    if node.op == "placeholder" or not isinstance(value, Tensor):
        return False
    return math.prod(value.shape) * value.element_size() >= _LARGE


def _result(program: Program, nodes: list[Node]) -> Iterator[str]:
    """Loss, 1/R_, check, gradients by parameter, and statistics by layer if there are any."""
    loss, scale, check, *rest = nodes
    gradients = zip(program.gradients, rest, strict=False)
    yield "    gradients = {"
    yield from (f"        {quoted(name)}: {node}," for name, node in gradients)
    yield "    }"
    if program.variant != "batch_statistics":
        yield f"    return {loss}.detach(), {scale}, {check}, gradients"
        return
    by_layer: dict[str, list[str]] = {}
    for (key, name), node in zip(program.state_outputs, rest[len(program.gradients) :], strict=True):
        by_layer.setdefault(key, []).append(f"{quoted(name)}: {node}")
    yield "    statistics = {"
    yield from (f"        {quoted(key)}: {{{', '.join(items)}}}," for key, items in by_layer.items())
    yield "    }"
    yield f"    return {loss}.detach(), {scale}, {check}, gradients, statistics"
