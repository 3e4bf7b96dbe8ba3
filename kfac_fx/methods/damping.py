"""How lambda enters a Kronecker-factored block: rules D0 to D4 of methods.md 1.6.

Enters: factors and lambda, a number or a 0-dim tensor. Leaves: what to add to each factor. Martens & Grosse
2015 (arXiv:1503.05671), section 6.3, for "factored"; the others are those of published code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfac_fx.linalg import damped_inverses, mean_eigenvalue, number, pi_ratio, small_inverse
from kfac_fx.spectrum import largest_eigenvalue, pseudo_inverses
from kfac_fx.types import Refreshed, State

RULES = ("tikhonov", "factored", "sqrt", "full", "relative")
FLOOR = 1e-4


def scale(rule: str, factor: Tensor) -> Tensor:
    """The number per group that a rule reads of a factor: its largest eigenvalue or its mean one."""
    return largest_eigenvalue(factor) if rule == "relative" else mean_eigenvalue(factor)


def paired_dampings(rule: str, damping: float | Tensor, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """What is added to A and to G. Any rule but "tikhonov", which damps the block.

    a, g: the factors' `scale`s, [groups] each, as are the results.
    """
    damping = number(damping, like=a)
    if rule == "full":
        return damping.expand_as(a), damping.expand_as(g)
    if rule == "relative":
        return (damping * a).clamp(min=FLOOR), (damping * g).clamp(min=FLOOR)
    assert rule in ("factored", "sqrt"), f"{rule} damps the block, not its factors"
    root = damping.sqrt()
    pi = pi_ratio(a, g) if rule == "factored" else torch.ones_like(a)
    return pi * root, root / pi


def damped_blocks(rule: str, damping: float | Tensor, blocks: Tensor) -> Tensor:
    """(F + lambda I)^-1 of small blocks [channels, k, k], k = 1 or 2; relative to each block for "relative".

    A block is one matrix, so that the rules that differ in the split between two factors agree here.
    """
    if rule == "relative":
        bound = blocks.diagonal(dim1=-2, dim2=-1).mean(-1) + _deviation(blocks)
        damping = (number(damping, like=bound) * bound).clamp(min=FLOOR)
    return small_inverse(blocks, damping)


def inverted_blocks(
    rule: str, damping: float | Tensor, states: Mapping[str, State]
) -> tuple[dict[str, State], dict[str, State]]:
    """(`F_inverse` of every layer of blocks, the states of the others)."""
    blocks = {key: state["F"] for key, state in states.items() if "F" in state}
    rest = {key: state for key, state in states.items() if key not in blocks}
    return {key: {"F_inverse": damped_blocks(rule, damping, f)} for key, f in blocks.items()}, rest


def _deviation(blocks: Tensor) -> Tensor:
    """Half the distance of the two eigenvalues of each block; 0 where k = 1."""
    if blocks.shape[-1] == 1:
        return torch.zeros_like(blocks[:, 0, 0])
    return torch.hypot((blocks[:, 0, 0] - blocks[:, 1, 1]) / 2, blocks[:, 0, 1])


def inverted(
    sides: Mapping[str, Sequence[Tensor | None]],
    dampings: Mapping[str, Sequence[Tensor]],
    states: Mapping[str, State],
    *,
    undamped: bool,
) -> tuple[dict[str, State], Refreshed]:
    """`A_inverse` and `G_inverse` of every layer; equal sizes in one batched call.

    sides: (A, G) or (A,) of each layer; None: not to be inverted here. dampings: [groups] each, in the same
    places. states: the last inverses. undamped: pseudo-inverses instead.
    """
    new: dict[str, State] = {key: {} for key in sides}
    places, factors, added = [], [], []
    for key, pair in sides.items():
        for name, factor, damping in zip(("A_inverse", "G_inverse"), pair, dampings[key], strict=False):
            if factor is None:
                continue
            if factor.dim() == 1:
                new[key][name] = diagonal_inverse(factor, damping)
                continue
            places.append((key, name))
            factors.append(factor)
            added.append(damping)
    last = [states[key][name] for key, name in places]
    result = pseudo_inverses(factors, last=last) if undamped else damped_inverses(factors, added, last=last)
    for (key, name), inverse in zip(places, result.inverses, strict=True):
        new[key][name] = inverse
    return new, Refreshed(retried=result.retried + result.raised, kept_last=result.kept_last)


def diagonal_inverse(factor: Tensor, damping: Tensor) -> Tensor:
    """1 / (f + damping) of [d]; 0 where that is not positive: a direction without curvature."""
    damped = factor + damping.to(factor.dtype)
    return (1 / damped).masked_fill(~(damped > 0), 0.0)
