"""One section per layer of an exported training step: its state, and its gradients as one matrix and back.

Enters: a plan. Leaves: lines of Python. Where a factor is computed is a mark, `LINE`, of a variable; it is
replaced by a line number when the file is complete.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from kfac_fx.canonical import initial_state, state_dtype, state_owner
from kfac_fx.layout import Layout, Permute
from kfac_fx.planned import Plan
from kfac_fx.report.comments import in_comment, in_docstring
from kfac_fx.types import FactorSpec, LayerMatch
from kfac_fx.writer import Key

RULE = "# " + "-" * 106
LINE = "@line of {}@"


def quoted(text: str) -> str:
    """A string literal."""
    return json.dumps(text, ensure_ascii=False)


def tuple_text(names: Sequence[str]) -> str:
    """A tuple of string literals."""
    return f"({', '.join(map(quoted, names))}{',' if len(names) == 1 else ''})"


def variable(text: str) -> str:
    """A parameter's name, or one of its parts, as an ASCII name that the graph may still have to change."""
    clean = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_")
    return clean if clean.isidentifier() else f"p_{clean}"


def class_names(plan: Plan, taken: set[str]) -> dict[str, str]:
    """A class for each layer, by its key; none of `taken`."""
    names: dict[str, str] = {}
    for match in plan.matched:
        parts = re.split(r"[\W_]+", match.key.removesuffix(".weight"), flags=re.ASCII)
        base = "".join(part[:1].upper() + part[1:] for part in parts if part)
        base = base if base.isidentifier() and not keyword.iskeyword(base) else f"Layer{base}"
        name, number = base, 2
        while name in taken or name in names.values():
            name, number = f"{base}{number}", number + 1
        names[match.key] = name
    return names


def sections(plan: Plan, names: Mapping[str, str], variables: Mapping[Key, str]) -> Iterator[str]:
    """A section for each layer, `LAYERS`, and `to_all_parameters`.

    names: of their classes, by key. variables: of the program, that hold their statistics.
    """
    for match in plan.matched:
        yield "\n".join([*_heading(plan, match, variables), *_layer_class(plan, match, names[match.key])])
    listed = "".join(f"    {name},\n" for name in names.values())
    yield f"LAYERS: tuple[type[Layer], ...] = (\n{listed})" if listed else "LAYERS = ()"
    yield "\n".join(_to_all_parameters(plan))


def _heading(plan: Plan, match: LayerMatch, variables: Mapping[Key, str]) -> Iterator[str]:
    """What the layer is, and what computes its factors."""
    yield RULE
    yield from (f"# {in_comment(text)}" for text in _facts(plan, match, variables))
    yield RULE


def _facts(plan: Plan, match: LayerMatch, variables: Mapping[Key, str]) -> Iterator[str]:
    source = f", {match.source}  {match.source.code}" if match.source else ""
    yield f"{match.name or match.key} ({match.kind}){source}"
    matrix = "[channels, entries]" if match.structure == "block" else "[groups, out, in]"
    rows = "" if match.part is None else f", rows {match.part[0]} to {match.part[1]}"
    yield f"gradient of {match.weight}{rows}{' and ' + match.bias if match.bias else ''} as one {matrix}"
    specs = [spec for spec in plan.factors if spec.owner == match.key]
    for name in plan.method.statistics_names(match):
        owner = state_owner(plan, match, name)
        form = next((f": {_form(spec)}" for spec in specs if spec.side == name[0]), "")
        if owner != match.key:
            yield f"{name} is that of {owner}, which reads the same input"
            continue
        computed = variables.get((match.key, name))
        yield f"{name}{form}" + (f"; line {LINE.format(computed)}" if computed else "")


def _form(spec: FactorSpec) -> str:
    shape = f"{spec.dim} numbers" if spec.diagonal else f"{spec.dim}x{spec.dim}"
    many = f"{spec.count} of " if spec.count > 1 and not spec.diagonal else ""
    return f"{many}{shape}, {spec.form}"


def _layer_class(plan: Plan, match: LayerMatch, name: str) -> Iterator[str]:
    state = initial_state(plan, match)
    owners = {n: state_owner(plan, match, n) for n in state}
    shared = {n: owner for n, owner in owners.items() if owner != match.key}
    yield f"class {name}(Layer):"
    about = f"{match.name or match.key}: {match.weight}{' and ' + match.bias if match.bias else ''}."
    yield f'    """{in_docstring(about)}"""'
    yield ""
    yield f"    key = {quoted(match.key)}"
    yield f"    weight = {quoted(match.weight)}"
    yield f"    names = {tuple_text(list(state))}"
    listed = ", ".join(f"{quoted(n)}: {quoted(owner)}" for n, owner in shared.items())
    yield f"    owners = {{{listed}}}"
    yield ""
    yield "    @staticmethod"
    yield "    def initial_state() -> dict[str, Tensor]:"
    yield "        return {"
    for tensor_name, fill in _fills(plan, match).items():
        if tensor_name not in shared:
            yield f"            {quoted(tensor_name)}: {fill},"
    yield "        }"
    yield ""
    yield "    @staticmethod"
    yield "    def to_matrix(gradients: Mapping[str, Tensor]) -> Tensor:"
    yield from _to_matrix(match)
    yield ""
    yield "    @staticmethod"
    yield "    def to_parameters(direction: Tensor) -> dict[str, Tensor]:"
    yield from _to_parameters(match)


def _fills(plan: Plan, match: LayerMatch) -> dict[str, str]:
    """An expression for each tensor of the layer's state before any statistics."""
    dtype = state_dtype(plan, match)
    found = plan.method.init(match, dtype=dtype, device=torch.device("cpu"))
    return {name: _fill(tensor) for name, tensor in found.items()}


def _fill(tensor: Tensor) -> str:
    """Zeros, ones or identity matrices."""
    sizes, options = list(tensor.shape), f"dtype={tensor.dtype}, device=DEVICE"
    for maker in ("zeros", "ones"):
        if torch.equal(tensor, _maker(maker)(tensor.shape, dtype=tensor.dtype)):
            return f"torch.{maker}({sizes}, {options})"
    eye = torch.eye(sizes[-1], dtype=tensor.dtype)
    assert torch.equal(tensor, eye.expand(sizes)), "a state starts with something else than an identity"
    return f"torch.eye({sizes[-1]}, {options}).repeat({sizes[0]}, 1, 1)"


def _maker(name: str) -> Callable[..., Tensor]:
    return {"zeros": torch.zeros, "ones": torch.ones}[name]


def _to_matrix(match: LayerMatch) -> Iterator[str]:
    yield f"        weight = {_matrix_of(match.layout, _gradient(match, match.weight))}"
    pieces = ["weight"]
    if match.bias is not None and match.bias_layout is not None:
        yield f"        bias = {_matrix_of(match.bias_layout, _gradient(match, match.bias))}"
        pieces.append("bias")
    if match.structure == "block":
        yield f"        return torch.stack([{', '.join(pieces)}], -1)"
    elif len(pieces) == 1:
        yield "        return weight"
    else:
        yield "        return torch.cat([weight, bias.unsqueeze(-1)], -1)"


def _gradient(match: LayerMatch, name: str) -> str:
    rows = "" if match.part is None else f"[{match.part[0]} : {match.part[1]}]"
    return f"gradients[{quoted(name)}]{rows}"


def _to_parameters(match: LayerMatch) -> Iterator[str]:
    inner, items = "direction", []
    if match.bias is not None and match.bias_layout is not None:
        inner = "direction[..., :-1]"
        items.append(f"{quoted(match.bias)}: {_parameter_of(match.bias_layout, 'direction[..., -1]')}")
    inner = "direction[..., 0]" if match.structure == "block" else inner
    items.insert(0, f"{quoted(match.weight)}: {_parameter_of(match.layout, inner)}")
    yield "        return {"
    yield from (f"            {item}," for item in items)
    yield "        }"


def _matrix_of(layout: Layout, expression: str) -> str:
    """Parameter's shape -> matrix, as `Layout.to_matrix`."""
    for step in reversed(layout.steps):
        if isinstance(step, Permute):
            inverse = sorted(range(len(step.dims)), key=step.dims.__getitem__)
            expression += f".permute({_listed(inverse)})"
        else:
            expression += f".reshape({_listed(step.before)})"
    return expression


def _parameter_of(layout: Layout, expression: str) -> str:
    """Matrix -> parameter's shape, as `Layout.to_parameter`."""
    for step in layout.steps:
        sizes = step.dims if isinstance(step, Permute) else step.after
        expression += f".{'permute' if isinstance(step, Permute) else 'reshape'}({_listed(sizes)})"
    return expression


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes)) if sizes else "()"


def _to_all_parameters(plan: Plan) -> Iterator[str]:
    """The function that puts all layers' directions back; parts of one parameter are joined."""
    pieces: dict[str, list[LayerMatch]] = {}
    for match in plan.matched:
        for name in (match.weight, match.bias):
            if name is not None:
                pieces.setdefault(name, []).append(match)
    parted = {name: found for name, found in pieces.items() if found[0].part is not None}
    yield "def to_all_parameters("
    yield "    gradients: Mapping[str, Tensor], directions: Sequence[Tensor]"
    yield ") -> dict[str, Tensor]:"
    yield '    """Directions of all layers, in their order, as gradients of their parameters."""'
    yield "    found: dict[str, Tensor] = {}"
    if parted:
        yield "    parts: list[dict[str, Tensor]] = []  # of parameters that several layers share"
    yield "    for layer, direction in zip(LAYERS, directions, strict=True):"
    yield "        found |= layer.to_parameters(direction)"
    if parted:
        yield "        parts.append(layer.to_parameters(direction))"
    index = {match.key: place for place, match in enumerate(plan.matched)}
    for name, found in parted.items():
        joined, position = [], 0
        for match in sorted(found, key=lambda match: match.part or (0, 0)):
            start, stop = match.part or (0, 0)
            if start > position:
                joined.append(f"gradients[{quoted(name)}][{position}:{start}]")
            joined.append(f"parts[{index[match.key]}][{quoted(name)}].to(gradients[{quoted(name)}].dtype)")
            position = stop
        joined.append(f"gradients[{quoted(name)}][{position}:]")
        yield f"    found[{quoted(name)}] = torch.cat("
        yield "        ["
        yield from (f"            {piece}," for piece in joined)
        yield "        ]"
        yield "    )"
    yield "    return {name: direction.to(gradients[name].dtype) for name, direction in found.items()}"
