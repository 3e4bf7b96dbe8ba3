"""From recognised products to `LayerMatch` records: biases join their weights, equal inputs share one A.

Enters: products of each parameter (`Found`). Leaves: matches in forward order. Recognises nothing itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.fx import Node

from kfac_fx import graph as fxgraph
from kfac_fx.graph import aten, getitem_source, is_op
from kfac_fx.layers import KINDS, Product
from kfac_fx.layout import Layout, Permute, View
from kfac_fx.traced import Capture, Parameter
from kfac_fx.types import LayerMatch, Use
from kfac_fx.walk import Term, base, base_value, gradient_terms

Part = tuple[int, int] | None
_LARGEST_CHECKED = 1 << 24


@final
@dataclass(frozen=True, kw_only=True)
class Found:
    """Products of one part of one parameter, one per term, all of one layout.

    passes: per term its `g` in each Fisher pass that reaches the part, None where it does not reach the term.
    """

    parameter: Parameter
    part: Part
    products: tuple[Product, ...]
    terms: tuple[Term, ...]
    layout: Layout
    swapped: tuple[bool, ...]
    passes: tuple[tuple[Node | None, ...], ...]


@final
@dataclass(frozen=True, kw_only=True)
class Bias:
    """A bias that joins the uses `joined` of the match it belongs to."""

    parameter: Parameter
    joined: frozenset[int]


def join_biases(
    capture: Capture, parameters: list[Parameter], found: list[Found], biases: dict[tuple[str, Part], Bias]
) -> list[Parameter]:
    """Biases whose gradient sums the same `g` as a weight's join that weight.

    Returns the parameters that do not.
    """
    roots: dict[object, tuple[Found, int]] = {}
    for item in found:
        for index, product in enumerate(item.products):
            roots.setdefault(product.bias_root, (item, index))
    rest = []
    for parameter in parameters:
        joined = _owner(capture, parameter, roots)
        if joined is None or any(key in biases for key in joined):
            rest.append(parameter)
        else:
            biases.update({key: Bias(parameter=parameter, joined=uses) for key, uses in joined.items()})
    return rest


def _owner(
    capture: Capture, parameter: Parameter, roots: Mapping[object, tuple[Found, int]]
) -> dict[tuple[str, Part], frozenset[int]] | None:
    """Per matched part, the uses that add this bias; None if some term of its gradient is something else."""
    joined: dict[tuple[str, Part], set[int]] = {}
    for term in gradient_terms(capture.gradients[parameter.name], stop=roots):
        entry = roots.get(term.root if term.root in roots else _bias_root(term))
        if entry is None:
            return None
        item, index = entry
        if term.part != item.part or term.scale != item.terms[index].scale or any(item.swapped):
            return None
        if not _bias_fits(term, item.products[index]):
            return None
        joined.setdefault((item.parameter.name, item.part), set()).add(index)
    if len({part for _, part in joined}) < len(joined):
        return None
    return {key: frozenset(uses) for key, uses in joined.items()}


def _bias_root(term: Term) -> object:
    """What identifies the `g` that a bias' gradient sums."""
    selected = getitem_source(term.root)
    if selected is not None:
        return selected
    if is_op(term.root, aten.sum.dim_IntList):
        source = term.root.args[0]
        assert isinstance(source, Node)
        return base(source)
    return term.root


def _bias_fits(term: Term, product: Product) -> bool:
    """Whether the bias' gradient, flattened, runs over the product's output features in their order."""
    if not all(isinstance(step, View) for step in term.steps):
        return False
    if _bias_root(term) == product.bias_root and getitem_source(term.root) is not None:
        return True
    if product.options["kind"] in ("embedding", "gathered-experts"):
        return False
    source, dims = term.root, set()  # one row: autograd sums nothing
    sizes = fxgraph.shape(source)
    if is_op(term.root, aten.sum.dim_IntList):
        source = term.root.args[0]
        assert isinstance(source, Node)
        sizes = fxgraph.shape(source)
        dims = {int(d) % len(sizes) for d in term.root.args[1]}  # type: ignore[union-attr,arg-type]
    kept = [size for d, size in enumerate(sizes) if d not in dims]
    features = product.groups * product.d_out if product.structure == "kronecker" else product.groups
    if math.prod(kept) != features or math.prod(sizes) > _LARGEST_CHECKED:
        return False
    labels = torch.arange(features, dtype=torch.int32)
    labels = labels.reshape([1 if d in dims else size for d, size in enumerate(sizes)]).expand(sizes)
    return _rows_carry(labels, source, product)


def _rows_carry(labels: Tensor, source: Node, product: Product) -> bool:
    """Send feature labels from the summed tensor through the views to the product's rows, and compare."""
    _, to_source = base_value(source)
    _, to_g = base_value(product.g)
    base = _layout(to_source).to_matrix(labels)
    g = _layout(to_g).to_parameter(base)
    kind = next(k for k in KINDS if k.name == product.options["kind"])
    use = Use(a=None, g=(), grad=source, geometry=product.geometry, options=product.options)
    rows = kind.output_rows(use, g, ())
    if product.structure == "block":
        return bool((rows == torch.arange(product.groups, dtype=torch.int32)).all())
    expected = torch.arange(product.groups * product.d_out, dtype=torch.int32).reshape(
        product.groups, 1, 1, -1
    )
    return bool((rows == expected).all())


def _layout(steps: tuple[object, ...]) -> Layout:
    return Layout(steps=tuple(step for step in steps if isinstance(step, Permute | View)))


def finish(
    capture: Capture, found: list[Found], biases: Mapping[tuple[str, Part], Bias]
) -> tuple[LayerMatch, ...]:
    """Matches in forward order.

    Layers that read one tensor in one way name the first of them as owner of A.
    """
    order = {node: i for i, node in enumerate(capture.graph.graph.nodes)}

    def position(item: Found) -> tuple[int, Part | tuple[()]]:
        users = [order[user] for user in item.parameter.node.users]
        return min(users, default=0), item.part or ()

    owners: dict[object, str] = {}
    matches = []
    for item in sorted(found, key=position):
        matches.append(_match(capture, item, biases.get((item.parameter.name, item.part)), owners))
    return tuple(matches)


def _match(capture: Capture, item: Found, bias: Bias | None, owners: dict[object, str]) -> LayerMatch:
    name, first = item.parameter.name, item.products[item.swapped.index(False)]
    key = name if item.part is None else f"{name}[{item.part[0]}:{item.part[1]}]"
    uses = tuple(
        Use(
            a=product.a,
            g=(product.g, *(g for g in others if g is not None)),
            grad=term.root,
            operands=product.operands,
            geometry=product.geometry,
            scale=term.scale,
            bias=bias is not None and index in bias.joined,
            options={**product.options, "swapped": swapped},
            absent=tuple(place for place, g in enumerate(others) if g is None),
        )
        for index, (product, term, swapped, others) in enumerate(
            zip(item.products, item.terms, item.swapped, item.passes, strict=True)
        )
    )
    kronecker = first.structure == "kronecker"
    share = share_key(uses) if kronecker and not any(item.swapped) else key
    rows = (
        item.part[1] - item.part[0] if item.part else item.parameter.shape[0] if item.parameter.shape else 1
    )
    numel = item.parameter.numel // max(item.parameter.shape[0], 1) * rows if item.parameter.shape else 1
    return LayerMatch(
        name=key.removesuffix(".weight"),
        key=key,
        kind=_kind_name(item, first),
        structure=first.structure,
        weight=name,
        bias=None if bias is None else bias.parameter.name,
        part=item.part,
        uses=uses,
        layout=item.layout,
        bias_layout=None if bias is None else _bias_layout(item, first, bias),
        groups=first.groups,
        d_in=first.d_in + (bias is not None and kronecker),
        d_out=first.d_out,
        rows=sum(p.rows for p in item.products),
        examples=_examples(uses[item.swapped.index(False)], first),
        numel=numel + (0 if bias is None else _bias_numel(item, bias)),
        shared_a=owners.setdefault(share, key),
        source=capture.user_sources.get(name),
    )


def _examples(use: Use, product: Product) -> int:
    """Length of the example axis of the use's rows."""
    if product.structure == "block":
        return product.rows
    kind = next(k for k in KINDS if k.name == product.options["kind"])
    operands = tuple(_on_meta(node) for node in use.operands)
    return kind.output_rows(use, _on_meta(use.g[0]), operands).shape[1]


def _on_meta(node: Node) -> Tensor:
    """A tensor without data of the node's shape. Not fake: those take ten times as long per operator."""
    value = fxgraph.value(node)
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _kind_name(item: Found, first: Product) -> str:
    if any(item.swapped):
        return "tied-embedding" if first.structure == "diagonal" else "tied-linear"
    return first.kind


def _bias_numel(item: Found, bias: Bias) -> int:
    return bias.parameter.numel if item.part is None else item.part[1] - item.part[0]


def _bias_layout(item: Found, first: Product, bias: Bias) -> Layout:
    before = (first.groups,) if first.structure == "block" else (first.groups, first.d_out)
    shape = bias.parameter.shape
    if item.part is not None:
        shape = (item.part[1] - item.part[0], *shape[1:])
    return Layout(steps=(View(before=before, after=shape),))


def share_key(uses: tuple[Use, ...]) -> object:
    """Equal keys mean equal A: the same tensors read in the same way, with or without the column of ones."""
    parts = []
    for use in uses:
        assert use.a is not None
        options = tuple(
            sorted((k, repr(v)) for k, v in use.options.items() if k not in ("g_transposed", "swapped"))
        )
        parts.append((base_value(use.a), use.geometry, use.bias, options))
    return tuple(parts)
