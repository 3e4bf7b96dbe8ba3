"""`train_step.py`: the transformed training step as one file that imports torch and nothing of this library.

Enters: a plan and the model with its example batch. Leaves: the file, and `train_step.pt` with parameters,
buffers and constants. The file holds the driver (`runtime`), the method's own source (`bundle`), a section
per layer (`layer_sections`) and the programs (`program_text`).
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfac_fx.contracts import DampedMethod, Plan
from kfac_fx.errors import ExportError
from kfac_fx.export import runtime
from kfac_fx.export.bundle import Bundle, bundle
from kfac_fx.export.example_batch import batch_text
from kfac_fx.export.layer_sections import class_names, quoted, sections, tuple_text
from kfac_fx.export.program_text import ProgramText, program_text
from kfac_fx.export.sources import External, source_module
from kfac_fx.instrument import instrument
from kfac_fx.lower import mutated_placeholders
from kfac_fx.methods import METHODS
from kfac_fx.report.program import WIDTH
from kfac_fx.target import Target

FILE = "train_step.py"
TENSORS = "train_step.pt"
_ROOTS = ("Layer", "initial_state", "step", "main")
_MEMBERS = ("statistics_every", "inverse_every", "fold", "new_weight", "refresh", "precondition", "rescale")
_PROVIDED = (
    "METHOD",
    "DEVICE",
    "FROZEN",
    "CHANGED_BUFFERS",
    "EXPECTED",
    "LAYERS",
    "make_optimizer",
    "tensors_of",
    "random_batch",
    "to_all_parameters",
    "loss_and_gradients",
    "loss_gradients_and_statistics",
    "aten",
    "device",
    "inf",
    "nan",
)
_BAR = "# " + "=" * 106
_MARK = re.compile(r"@line of (\w+)@")


def train_step(plan: Plan, target: Target) -> Mapping[str, str | bytes]:
    """`train_step.py` and `train_step.pt`; where that cannot be, a file that says why when it is run."""
    try:
        return export_train_step(plan, target)
    except ExportError as error:
        message = f"{FILE} was not written: {error}"
        warnings.warn(message, stacklevel=2)
        return {FILE: f'"""Not written."""\n\nraise SystemExit({message!r})\n'}


def export_train_step(plan: Plan, target: Target) -> dict[str, str | bytes]:
    """The two files. Raises `ExportError` where the step cannot be written as a file of its own."""
    _check_method(plan)
    programs = {
        "loss_gradients_and_statistics": instrument(plan, "batch_statistics"),
        "loss_and_gradients": instrument(plan, "gradients"),
    }
    texts: dict[str, ProgramText] = {}
    constants: Mapping[str, Tensor] = {}
    for name, program in programs.items():
        summary = "Loss, gradients" + (", statistics of this batch." if "statistics" in name else ".")
        texts[name] = program_text(plan, program, name=name, summary=summary, known=constants)
        constants = texts[name].constants
    roots = [*_ROOTS, *sorted({helper for text in texts.values() for helper in text.helpers})]
    copied = bundle(
        [(runtime.__name__, name) for name in roots], type(plan.method), _MEMBERS, reserved=_PROVIDED
    )
    classes = class_names(plan, set(_PROVIDED) | set(copied.names.values()))
    parts = {
        "The training step": [copied.text[runtime.__name__]],
        f"The method: {plan.method.name}": list(_method_text(plan, copied)),
        "Settings": [*_settings(plan, target, copied), batch_text(plan, target.inputs, target.targets)],
        "Layers": list(sections(plan, classes)),
        "Programs": [text.text for text in texts.values()],
    }
    names = frozenset(name for text in texts.values() for name in text.names)
    blocks = [*_head(plan, target, list(parts)), *_imports(copied.imports | _literals(names))]
    body = [block for title, part in parts.items() for block in (_title(title), *part)]
    end = 'if __name__ == "__main__":\n    main()'
    text = "\n\n\n".join(["\n".join(blocks), *body, end]) + "\n"
    return {FILE: _with_line_numbers(text), TENSORS: _tensors(target.model, constants)}


def _check_method(plan: Plan) -> None:
    method = plan.method
    if type(method) not in METHODS.values():
        raise ExportError(
            f"its method {type(method).__name__} is not one of this library: {', '.join(METHODS)}."
        )
    if off := plan.without & {"statistics", "averages", "precondition", "lengths"}:
        raise ExportError(f"passes are switched off: {', '.join(sorted(off))}. Export with all passes on.")
    if isinstance(method, DampedMethod) and method.quadratic is not None:
        raise ExportError(
            "quadratic_model=True runs the model several times per step; export with quadratic_model=False."
        )


def _head(plan: Plan, target: Target, titles: Sequence[str]) -> Iterator[str]:
    method: Any = plan.method
    yield f'"""One training step of {plan.capture.model_name} with {method.name}; needs torch alone.'
    yield ""
    yield f"Written by kfac_fx for {target.label}, with fisher={plan.fisher} and sharing={plan.sharing}."
    yield f"Method: {method.paper}."
    yield f"`python {FILE}` does a few steps on random data. In a program:"
    yield ""
    yield "    state = initial_state()  # parameters and buffers are read from train_step.pt"
    yield "    loss = step(state, inputs, targets)"
    yield ""
    yield "Batch shapes, train or eval mode and device are those of the export. The parts of this file:"
    yield from (f"    {title}" for title in titles)
    yield '"""'
    yield ""


def _literals(names: frozenset[str]) -> set[External]:
    """Imports for what the programs' literals need."""
    homes = {"device": "torch", "inf": "math", "nan": "math"}
    always = {External(module="collections.abc", name=name, alias=name) for name in ("Mapping", "Sequence")}
    return always | {External(module=homes[name], name=name, alias=name) for name in names}


def _imports(imports: Iterable[External]) -> Iterator[str]:
    """Standard library first, then torch; what comes of one module on one line."""
    grouped: dict[str, list[str]] = {}
    plain = []
    for item in imports:
        if item.module is None:
            plain.append(str(item))
        else:
            grouped.setdefault(item.module, []).append(str(item).split(" import ", 1)[1])
    lines = [*sorted(plain)]
    lines += [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(grouped.items())]
    first = [line for line in lines if not line.split()[1].startswith("torch")]
    yield from first
    yield ""
    yield from (line for line in lines if line not in first)
    yield ""
    yield "aten = torch.ops.aten"


def _title(title: str) -> str:
    return f"{_BAR}\n# {title}\n{_BAR}"


def _method_text(plan: Plan, copied: Bundle) -> Iterator[str]:
    """The method's source by module, each under what the module says of itself."""
    yield "# Copied from kfac_fx, without what a training step does not use, settings included."
    for module, text in copied.text.items():
        if module == runtime.__name__:
            continue
        name = module.split(".", 1)[1].replace(".", "/")
        about = "" if name == "types" else f": {source_module(module).summary}"
        heading = "\n".join(textwrap.wrap(f"{name}.py{about}", WIDTH - 2))
        yield textwrap.indent(heading, "# ") + f"\n\n\n{text}"


def _settings(plan: Plan, target: Target, copied: Bundle) -> Iterator[str]:
    method: Any = plan.method
    values = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.name in copied.members}
    written = "".join(f"\n    {name}={_literal(value)}," for name, value in values.items())
    frozen = tuple(p.name for p in plan.capture.parameters if not p.trainable)
    names = [*(p.name for p in plan.capture.parameters), *plan.capture.buffers]
    changed = tuple(names[i] for i in mutated_placeholders(plan.capture.graph))
    parameter = next(iter(target.model.parameters()))
    name = copied.names[type(method).__module__, type(method).__qualname__]
    yield "\n".join(
        [
            f"METHOD = {name}({written}\n)",
            f"DEVICE = torch.device({quoted(str(parameter.device))})",
            f"FROZEN = {_tuple(frozen)}  # parameters that are not trained",
            f"CHANGED_BUFFERS = {_tuple(changed)}  # by the model's forward",
        ]
    )
    yield _optimizer(method)


def _tuple(names: Sequence[str]) -> str:
    """One name per line if there are several."""
    if len(names) < 2:
        return tuple_text(names)
    return "(\n" + "".join(f"    {quoted(name)},\n" for name in names) + ")"


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return quoted(value)
    return re.sub(r"\b(inf|nan)\b", r'float("\1")', repr(value))


def _optimizer(method: Any) -> str:
    """The published base optimizer, with the arguments that are not torch's own defaults."""
    made = method.base_optimizer([nn.Parameter(torch.zeros(1))])
    defaults = inspect.signature(type(made)).parameters
    stated = {
        name: value
        for name, value in made.defaults.items()
        if name in defaults and (name == "lr" or defaults[name].default != value)
    }
    arguments = "".join(f", {name}={_literal(value)}" for name, value in stated.items())
    assert type(made).__module__.startswith("torch.optim"), "a base optimizer that is not torch's own"
    return "\n".join(
        [
            "def make_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:",
            f'    """The base optimizer of {method.name}, which takes the preconditioned gradients."""',
            f"    return torch.optim.{type(made).__name__}(parameters{arguments})",
        ]
    )


def _with_line_numbers(text: str) -> str:
    """Replace each mark by the line that gives the variable its value, in the program with statistics."""
    lines = text.split("\n")
    number = {}
    for position, line in enumerate(lines, start=1):
        found = re.match(r"    (\w+) = aten\.|    (\w+) = \w+\[", line)
        if found is not None:
            number.setdefault(found[1] or found[2], position)
    return _MARK.sub(lambda mark: f"{number[mark[1]]}, {mark[1]}", text)


def _tensors(model: nn.Module, constants: Mapping[str, Tensor]) -> bytes:
    saved = {
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "buffers": {name: b.detach().clone() for name, b in model.named_buffers()},
        "constants": {name: c.clone() for name, c in constants.items()},
    }
    file = io.BytesIO()
    torch.save(saved, file)
    return file.getvalue()
