"""`train_step.py`: the transformed training step as one file that imports torch and nothing of this library.

Enters: a plan and the model with its example batch. Leaves: the file, and `train_step.pt` with parameters,
buffers and constants. The file holds the driver (`runtime`), the method's own source (`bundle`), settings
(`settings_text`), a section per layer (`layer_sections`) and the programs (`program_text`).
"""

from __future__ import annotations

import builtins
import io
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfac_fx.contracts import DampedMethod
from kfac_fx.errors import ExportError, ExportWarning
from kfac_fx.export import runtime
from kfac_fx.export.bundle import Bundle, bundle
from kfac_fx.export.example_batch import batch_text
from kfac_fx.export.layer_sections import class_names, sections
from kfac_fx.export.program_text import ProgramText, program_text
from kfac_fx.export.settings_text import settings
from kfac_fx.export.sources import External, source_module
from kfac_fx.export.subject import Subject
from kfac_fx.instrument import instrument
from kfac_fx.methods import METHODS
from kfac_fx.planned import Plan
from kfac_fx.report.comments import in_docstring
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
_ASSIGNED = re.compile(r"    (\w+) = ")


def train_step(subject: Subject) -> Mapping[str, str | bytes]:
    """`train_step.py` and `train_step.pt`; where that cannot be, a file that says why when it is run."""
    try:
        return export_train_step(subject.plan, subject.target)
    except ExportError as error:
        message = f"{FILE} was not written: {error}"
        warnings.warn(ExportWarning(message, file=FILE), stacklevel=2)
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
    names = frozenset(name for text in texts.values() for name in text.names)
    imports = copied.imports | _literals(names)
    taken = {*_PROVIDED, *copied.names.values(), *(item.alias for item in imports), *dir(builtins)}
    collecting = texts["loss_gradients_and_statistics"]
    parts = {
        "The training step": [copied.text[runtime.__name__]],
        f"The method: {plan.method.name}": list(_method_text(copied)),
        "Settings": [*settings(plan, target, copied), batch_text(plan, target.inputs, target.targets)],
        "Layers": list(sections(plan, class_names(plan, taken), collecting.statistics)),
        "Programs": [text.text for text in texts.values()],
    }
    blocks = [*_head(plan, target, list(parts)), *_imports(imports)]
    body = [block for title, part in parts.items() for block in (_title(title), *part)]
    end = 'if __name__ == "__main__":\n    main()'
    text = "\n\n\n".join(["\n".join(blocks), *body, end]) + "\n"
    text = _with_line_numbers(text, collecting.text)
    _check_python(text)
    return {FILE: text, TENSORS: _tensors(target.model, constants)}


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
    model = in_docstring(plan.capture.model_name)
    yield f'"""One training step of {model} with {method.name}; needs torch alone.'
    yield ""
    label = in_docstring(target.label)
    yield f"Written by kfac_fx for {label}, with fisher={plan.fisher} and sharing={plan.sharing}."
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


def _method_text(copied: Bundle) -> Iterator[str]:
    """The method's source by module, each under what the module says of itself."""
    yield "# Copied from kfac_fx, without what a training step does not use, settings included."
    for module, text in copied.text.items():
        if module == runtime.__name__:
            continue
        name = module.split(".", 1)[1].replace(".", "/")
        about = "" if name == "types" else f": {source_module(module).summary}"
        heading = "\n".join(textwrap.wrap(f"{name}.py{about}", WIDTH - 2))
        yield textwrap.indent(heading, "# ") + f"\n\n\n{text}"


def _with_line_numbers(text: str, program: str) -> str:
    """Replace each mark by the line of this program that gives the variable its value.

    A mark of no variable of the program stays: it is text of the user's.
    """
    first = text[: text.index(program)].count("\n") + 1
    number: dict[str, int] = {}
    for position, line in enumerate(program.split("\n"), start=first):
        if (found := _ASSIGNED.match(line)) is not None:
            number.setdefault(found[1], position)
    return _MARK.sub(lambda mark: f"{number[mark[1]]}, {mark[1]}" if mark[1] in number else mark[0], text)


def _check_python(text: str) -> None:
    try:
        compile(text, FILE, "exec")
    except (SyntaxError, ValueError) as error:
        raise ExportError(
            f"what would be written is not valid Python: {error}. This is an error of kfac_fx; please report "
            "it with the model."
        ) from error


def _tensors(model: nn.Module, constants: Mapping[str, Tensor]) -> bytes:
    saved = {
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "buffers": {name: b.detach().clone() for name, b in model.named_buffers()},
        "constants": {name: c.clone() for name, c in constants.items()},
    }
    file = io.BytesIO()
    torch.save(saved, file)
    return file.getvalue()
