"""A rewritten program as a Python function of named parameters, buffers and batch.

Enters: a `Program`. Leaves: text that runs as it is, the variables that hold its results, and the constants
that it reads. `program_lines` writes the statements.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kfac_fx import graph as fxgraph
from kfac_fx.errors import ExportError
from kfac_fx.export.layer_sections import quoted, variable
from kfac_fx.export.program_lines import body
from kfac_fx.instrument import Program
from kfac_fx.lower import with_full_float32
from kfac_fx.planned import Plan
from kfac_fx.report.program import wrapped
from kfac_fx.sources import user_source
from kfac_fx.writer import Key

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
    helpers: functions of `runtime` that it calls. statistics: variables of what it returns of each layer.
    """

    text: str
    constants: Mapping[str, Tensor]
    names: frozenset[str]
    helpers: frozenset[str]
    statistics: Mapping[Key, str]


def program_text(
    plan: Plan, program: Program, *, name: str, summary: str, known: Mapping[str, Tensor]
) -> ProgramText:
    """The program as function `name`. Its variables are renamed in `program`.

    known: constants of other programs, whose names are taken. Raises `ExportError` if it calls what only
    another package knows.
    """
    module = _as_run(program.module)
    _check(module)
    returned = _name_outputs(program, module)
    places, constants = _constants(module, known)
    code = module.graph.python_code("self", verbose=False)
    lines = [
        f"def {name}(",
        *SIGNATURE,
        ") -> tuple[Any, ...]:",
        f'    """{summary}"""',
        *_arguments(plan, program, module),
        *body(module, code.src.splitlines(), places=places),
        "",
        *_result(program, returned),
    ]
    text = "\n".join(piece for line in lines for piece in wrapped(line))
    literals = ("device", "inf", "nan")
    return ProgramText(
        text=text,
        constants=constants,
        statistics=_statistics(program, returned),
        helpers=frozenset(n for n in ("in_full_float32", "convolution_weight") if n in text),
        names=frozenset(n for n in literals if re.search(rf"(?<![\w.]){n}\b", text)),
    )


def _as_run(module: GraphModule) -> GraphModule:
    """The program as `lower` makes it for its device, in eager mode."""
    on_cuda = fxgraph.value(module.graph.output_node().all_input_nodes[0]).is_cuda
    return with_full_float32(module) if on_cuda else module


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
        found = getattr(found, part)
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
    names += [f"{name}_of_{variable(key)}" for key, name in program.state_outputs]
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
    for (key, name), value in _statistics(program, nodes).items():
        by_layer.setdefault(key, []).append(f"{quoted(name)}: {value}")
    yield "    statistics = {"
    yield from (f"        {quoted(key)}: {{{', '.join(items)}}}," for key, items in by_layer.items())
    yield "    }"
    yield f"    return {loss}.detach(), {scale}, {check}, gradients, statistics"


def _statistics(program: Program, nodes: list[Node]) -> dict[Key, str]:
    """The variable of each statistic, by layer and name. nodes: all that the program returns."""
    outputs = program.state_outputs
    return dict(zip(outputs, map(str, nodes[len(nodes) - len(outputs) :]), strict=True))
