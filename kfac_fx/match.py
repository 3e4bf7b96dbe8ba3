"""`Capture` -> `Matches`: account for every parameter, as a match or as a skip with a reason.

The walk starts at each parameter's gradient. A parameter is matched only if every term of its gradient is a
product that a layer kind knows and all of them have one layout; nothing is matched in part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from kfac_fx.align import ANOTHER_WAY, Pair, all_aligned
from kfac_fx.assemble import Bias, Found, Part, finish, join_biases
from kfac_fx.errors import Reason
from kfac_fx.graph import getitem_source
from kfac_fx.layers import KINDS, Facts, LayerKind, Product
from kfac_fx.layout import Layout, Permute, simplified
from kfac_fx.traced import Capture, Parameter
from kfac_fx.types import Matches, Skip
from kfac_fx.uses import other_use, spread_over_stored, told
from kfac_fx.walk import Term, gradient_terms

_NEIGHBOURHOOD = 24
_CONTRACTIONS = ("linear", "convolution")


def match(capture: Capture, *, exclude: Callable[[str], bool] = lambda name: False) -> Matches:
    """Account for every parameter of the model, as a match or as a skip with a reason."""
    facts = Facts(capture=capture, examples=capture.loss_info.examples)
    skips, open_ = _trivial_skips(capture, exclude)
    weight_kinds = [k for k in KINDS if k.name not in ("scale", "shift")]
    found: list[Found] = []
    biases: dict[tuple[str, Part], Bias] = {}
    reasons: dict[str, tuple[Reason, str]] = {}
    for stage in (
        weight_kinds,
        [k for k in KINDS if k.name == "scale"],
        [k for k in KINDS if k.name == "shift"],
    ):
        remaining = []
        for parameter in open_:
            result = _find(parameter, stage, facts)
            if isinstance(result, list):
                found += result
            else:
                reasons.setdefault(parameter.name, result)
                if result[0] is not Reason.NO_PATTERN:
                    reasons[parameter.name] = result
                remaining.append(parameter)
        open_ = join_biases(capture, remaining, found, biases)
    skips += [_skip(capture, p, *reasons[p.name]) for p in open_]
    return Matches(matched=finish(capture, found, biases), skipped=tuple(skips))


def _trivial_skips(capture: Capture, exclude: Callable[[str], bool]) -> tuple[list[Skip], list[Parameter]]:
    skips, open_ = [], []
    for parameter in capture.parameters:
        if not parameter.trainable:
            skips.append(_skip(capture, parameter, Reason.FROZEN, "requires_grad is False"))
        elif exclude(parameter.name):
            skips.append(_skip(capture, parameter, Reason.EXCLUDED, "named by exclude="))
        elif parameter.name not in capture.gradients:
            skips.append(_skip(capture, parameter, Reason.UNUSED, "it received no gradient"))
        elif parameter.dtype.is_complex:
            skips.append(_skip(capture, parameter, Reason.COMPLEX_DTYPE, str(parameter.dtype)))
        elif not any(parameter.name in p.gradients for p in capture.passes[1:] or capture.passes):
            where = "the prediction" if len(capture.losses) == 1 else "any prediction of the losses"
            skips.append(_skip(capture, parameter, Reason.OUTSIDE_FISHER, f"no gradient from {where}"))
        else:
            open_.append(parameter)
    return skips, open_


def _skip(capture: Capture, parameter: Parameter, reason: Reason, detail: str) -> Skip:
    source = capture.user_sources.get(parameter.name)
    return Skip(parameter=parameter.name, reason=reason, detail=detail, numel=parameter.numel, source=source)


def _find(parameter: Parameter, kinds: Sequence[LayerKind], facts: Facts) -> list[Found] | tuple[Reason, str]:
    """All parts of one parameter, or why it is not matched by these kinds."""
    spread = None if kinds[0].name not in ("scale", "shift") else spread_over_stored(parameter, facts.capture)
    if spread is not None:
        return Reason.REPARAMETRISED, f"it meets another stored tensor before the batch, in {told(spread)}"
    per_pass = []
    for backward in facts.capture.passes:
        if parameter.name not in backward.gradients:  # zero: it starts at the prediction of another loss
            continue
        terms = gradient_terms(backward.gradients[parameter.name])
        products = []
        for term in terms:
            product = recognise(term, kinds, facts)
            if isinstance(product, tuple):
                return product if len(terms) == 1 else _mixed(parameter, terms, product, kinds, facts)
            products.append(product)
        if not per_pass and all(product.constant_input for product in products):
            return Reason.BATCH_FREE, f"its product is {_describe(terms[0].root)}"
        per_pass.append(list(zip(terms, products, strict=True)))
    parts = _by_part(per_pass[0])
    if parts is None:
        return Reason.MIXED_USE, "overlapping parts of it are used in different products"
    if any(term.part not in parts for other in per_pass[1:] for term, _ in other):
        return Reason.OUTSIDE_FISHER, ANOTHER_WAY
    found = []
    for part, pairs in parts.items():
        others = all_aligned(pairs, [[q for q in other if q[0].part == part] for other in per_pass[1:]])
        if isinstance(others, str):
            return Reason.OUTSIDE_FISHER, others
        result = _one_layout(parameter, part, pairs, others)
        if isinstance(result, tuple):
            return result
        found.append(result)
    return found


def recognise(term: Term, kinds: Iterable[LayerKind], facts: Facts) -> Product | tuple[Reason, str]:
    """The product at the term's root, or why there is none."""
    for kind in kinds:
        result = kind.match(term, facts)
        if isinstance(result, Product):
            return replace(result, options={**result.options, "kind": kind.name})
        if isinstance(result, Reason):
            return result, f"its product is {_describe(term.root)}"
    if _behind_product(term.root, kinds, facts):
        return Reason.REPARAMETRISED, f"its gradient comes from {_describe(term.root)}"
    return Reason.NO_PATTERN, f"its gradient comes from {_describe(term.root)}"


def _behind_product(root: Node, kinds: Iterable[LayerKind], facts: Facts) -> bool:
    """Whether a layer's weight gradient stands a few steps before the root.

    The parameter is a function's input.
    """
    contractions = [kind for kind in kinds if kind.name in _CONTRACTIONS]
    queue, seen = [root], {root}
    while queue and contractions and len(seen) < _NEIGHBOURHOOD:
        for node in queue.pop(0).all_input_nodes:
            if node in seen or node not in facts.capture.backward:
                continue
            term = Term(root=node)
            if any(isinstance(kind.match(term, facts), Product) for kind in contractions):
                return True
            seen.add(node)
            queue.append(node)
    return False


def _describe(node: Node) -> str:
    selected = getitem_source(node)
    if selected is not None:
        return f"output {selected[1]} of {selected[0].target}"
    return str(node.target)


def _mixed(
    parameter: Parameter, terms: list[Term], why: tuple[Reason, str], kinds: Sequence[LayerKind], facts: Facts
) -> tuple[Reason, str]:
    products = [recognise(term, kinds, facts) for term in terms]
    known = [product for product in products if isinstance(product, Product)]
    if not known:
        return why
    other = other_use(parameter, facts.capture, [product.a for product in known if product.a is not None])
    what = why[1] if other is None else told(other)
    return Reason.MIXED_USE, f"{len(known)} of {len(terms)} uses match, another does not: {what}"


def _by_part(pairs: list[Pair]) -> dict[Part, list[Pair]] | None:
    """Terms by the rows they write; None if different parts overlap."""
    parts: dict[Part, list[Pair]] = {}
    for term, product in pairs:
        parts.setdefault(term.part, []).append((term, product))
    if len(parts) == 1:
        return parts
    if None in parts:
        return None
    ordered = sorted(part for part in parts if part is not None)
    if any(first[1] > second[0] for first, second in zip(ordered, ordered[1:], strict=False)):
        return None
    return {part: parts[part] for part in ordered}


def _one_layout(
    parameter: Parameter,
    part: Part,
    pairs: list[Pair],
    others: list[list[Pair | None]],
) -> Found | tuple[Reason, str]:
    """All terms must write their canonical gradient into the parameter in the same way, or in the transposed
    one.
    """
    layouts = [simplified((*product.steps, *term.steps)) for term, product in pairs]
    lead = next((i for i, (_, p) in enumerate(pairs) if p.structure == "diagonal"), 0)
    first = pairs[lead][1]
    swapped = []
    for (_, product), layout in zip(pairs, layouts, strict=True):
        if (
            _same_size(product, first)
            and product.structure == first.structure
            and _equal(layout, layouts[lead], first)
        ):
            swapped.append(False)
        elif _transposed(product, layout, first, layouts[lead]):
            swapped.append(True)
        else:
            reason = Reason.TIED if parameter.aliases else Reason.MIXED_USE
            kinds = ", ".join(sorted({p.kind for _, p in pairs}))
            return reason, f"used as {kinds} in ways whose factors cannot be added"
    of_uses = [[other[i] for other in others] for i in range(len(pairs))]
    passes = tuple(tuple(None if one is None else one[1].g for one in use) for use in of_uses)
    return Found(
        parameter=parameter,
        part=part,
        products=tuple(p for _, p in pairs),
        terms=tuple(t for t, _ in pairs),
        layout=layouts[lead],
        swapped=tuple(swapped),
        passes=passes,
    )


def _same_size(left: Product, right: Product) -> bool:
    return (left.groups, left.d_in, left.d_out) == (right.groups, right.d_in, right.d_out)


def _transposed(product: Product, layout: Layout, first: Product, lead: Layout) -> bool:
    """Whether the product is the lead with input and output exchanged (embedding and head, tied
    autoencoder).
    """
    if product.structure == "block" or product.groups != 1 or first.groups != 1 or first.structure == "block":
        return False
    if (product.d_in, product.d_out) != (first.d_out, first.d_in) or product.structure != "kronecker":
        return False
    exchange = simplified((Permute(dims=(0, 2, 1)), *layout.steps))
    return _equal(exchange, lead, first)


def _equal(left: Layout, right: Layout, product: Product) -> bool:
    """Whether two layouts put every entry of the canonical gradient in the same place."""
    if left == right:
        return True
    if product.structure == "block":
        matrix = torch.arange(product.groups, dtype=torch.int32)
    else:
        size = product.groups * product.d_in * product.d_out
        matrix = torch.arange(size, dtype=torch.int32).reshape(product.groups, product.d_out, product.d_in)
    first, second = left.to_parameter(matrix), right.to_parameter(matrix)
    return first.shape == second.shape and bool((first == second).all())
