"""Products of one part of a parameter in several backward passes, put in the order of the training pass.

Enters: per pass the recognised terms of the parameter's gradient. Leaves: the same in one order, with gaps
where a pass does not reach a use.
"""

from __future__ import annotations

from collections.abc import Sequence

from kfac_fx.layers import Product
from kfac_fx.walk import Term, base_value

Pair = tuple[Term, Product]


ANOTHER_WAY = "the backward from the prediction uses it in another way"


def all_aligned(pairs: Sequence[Pair], passes: Sequence[Sequence[Pair]]) -> list[list[Pair | None]] | str:
    """Of each pass that reaches the part its products in the order of the training pass.

    pairs: of the training pass. passes: of the others. None in a place: the pass does not reach that use,
    since it starts at the prediction of another loss. A string: why there is no such order.
    """
    found: list[list[Pair | None]] = []
    reached = [0] * len(pairs)
    for others in passes:
        if not others:
            continue
        aligned = _aligned(pairs, others) if len(pairs) == len(others) else _some(pairs, others, reached)
        if isinstance(aligned, str):
            return aligned
        reached = [count + (one is not None) for count, one in zip(reached, aligned, strict=True)]
        found.append(aligned)
    if passes and 0 in reached:
        return "one of its uses has no gradient from a prediction"
    return found


def _aligned(pairs: Sequence[Pair], others: Sequence[Pair]) -> list[Pair | None] | str:
    """As many products in the order of the training pass: by equal inputs, else by position."""
    rest = list(others)
    ordered: list[Pair | None] = []
    for index, (_, product) in enumerate(pairs):
        key = None if product.a is None else base_value(product.a)
        same = [o for o in rest if o[1].a is not None and base_value(o[1].a) == key]
        chosen = same[0] if same else (others[index] if others[index] in rest else rest[0])
        if (chosen[1].kind, chosen[1].rows) != (product.kind, product.rows):
            return ANOTHER_WAY
        rest.remove(chosen)
        ordered.append(chosen)
    return ordered


def _some(pairs: Sequence[Pair], others: Sequence[Pair], reached: Sequence[int]) -> list[Pair | None] | str:
    """Products of a pass that reaches a part of the uses, by equal inputs.

    Uses of one input are alike to the factors; of them the one that fewer passes have reached.
    """
    found: list[Pair | None] = [None] * len(pairs)
    for other in others:
        key = _what_it_reads(other)
        free = [i for i, pair in enumerate(pairs) if found[i] is None and _what_it_reads(pair) == key]
        if not free:
            return "which of its uses the backward from one of the predictions reaches is not known"
        found[min(free, key=reached.__getitem__)] = other
    return found


def _what_it_reads(pair: Pair) -> tuple[object, ...]:
    term, product = pair
    source = None if product.a is None else base_value(product.a)
    return source, product.kind, product.rows, product.geometry, product.operands, term.scale
