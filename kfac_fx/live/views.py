"""The factors of one layer as a method keeps them: each with its damping and its stored inverse.

Enters: a method, one layer's state, lambda. Leaves: `View`s that share the state's tensors. A method of one's
own shows its dampings through `views.register`; without, its factors are shown by their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Literal, final

import torch
from torch import Tensor

from kfac_fx import woodbury
from kfac_fx.methods import EKFAC, FOOF, KFAC, NKFAC, SINGD, SKFAC, Diagonal
from kfac_fx.methods.damping import FLOOR
from kfac_fx.methods.kfac import joined_sides
from kfac_fx.methods.thin import current_factors
from kfac_fx.newton import relative_damping
from kfac_fx.types import State

Form = Literal["dense", "rows", "diagonal", "blocks", "root"]


@final
@dataclass(frozen=True, kw_only=True)
class View:
    """One factor of one layer.

    form: what `tensor` is. "dense": [groups, d, d]. "rows": X [groups, m, d] with X^T X the factor.
    "diagonal": eigenvalues, of any shape. "blocks": [channels, k, k], one block-diagonal matrix. "root": K
    [groups, d, d] or [d] with K K^T the inverse of the damped factor. damping: what is added now, [groups] or
    [channels], or 0-dim; None if nothing is added to this factor, or if that is not known. inverse: the
    stored one of the damped factor, shaped as the factor; None if none is stored.
    """

    side: str
    form: Form
    tensor: Tensor
    damping: Tensor | None = None
    inverse: Tensor | None = None


def factor_view(
    side: str, factor: Tensor, *, damping: Tensor | None = None, inverse: Tensor | None = None
) -> View:
    """A dense factor, or one that is a vector."""
    form = "diagonal" if factor.dim() == 1 else "dense"
    return View(side=side, form=form, tensor=factor, damping=damping, inverse=inverse)


@singledispatch
def views(method: object, state: State, damping: float) -> tuple[View, ...]:
    """Factors of a layer. damping: lambda as the factors are damped with it now.

    Of a method that is not known here: A, G, F and S of its state, without damping.
    """
    blocks = [_blocks(state, None)] if "F" in state and state["F"].dim() == 3 else []
    dense = [factor_view(side, state[side]) for side in ("A", "G") if side in state]
    return (*dense, *blocks, *(_diagonal(side, state, None) for side in ("S",) if side in state))


@views.register
def _(method: KFAC, state: State, damping: float) -> tuple[View, ...]:
    if "F" in state:
        relative = method.damping_rule == "relative" and damping > 0
        return (_blocks(state, damping, relative=relative),)
    factors = method.sides(state)
    names = ("Sigma" if "A_channels" in state else "A", "G")
    if method.keeps_eigenvectors or damping == 0:
        return tuple(factor_view(name, factor) for name, factor in zip(names, factors, strict=True))
    return _pairs(state, names, factors, method.dampings(state, damping))


@views.register
def _(method: NKFAC, state: State, damping: float) -> tuple[View, ...]:
    factors = state["A"], state["G"]
    added = [relative_damping(f, relative=method.damping, floor=method.damping_floor) for f in factors]
    return _pairs(state, ("A", "G"), factors, added)


@views.register
def _(method: FOOF, state: State, damping: float) -> tuple[View, ...]:
    if damping == 0:
        return (factor_view("A", state["A"]),)
    return _pairs(state, ("A",), (state["A"],), (_like(damping, state["A"]),))


@views.register
def _(method: SKFAC, state: State, damping: float) -> tuple[View, ...]:
    factors = current_factors(state)
    pairs = _pairs(state, ("A", "G"), factors, method.dampings(state, factors))
    return tuple(
        View(side=p.side, form="rows", tensor=p.tensor, damping=p.damping, inverse=_thin_inverse(state, p))
        if f"{p.side}_rows" in state
        else p
        for p in pairs
    )


@views.register
def _(method: EKFAC, state: State, damping: float) -> tuple[View, ...]:
    if "F" in state:
        return (_blocks(state, damping),)
    factors = zip(("A", "G"), joined_sides(state), strict=True)
    return (*(factor_view(name, factor) for name, factor in factors), _diagonal("S", state, damping))


@views.register
def _(method: Diagonal, state: State, damping: float) -> tuple[View, ...]:
    return (_diagonal(next(iter(state)), state, damping),)


@views.register
def _(method: SINGD, state: State, damping: float) -> tuple[View, ...]:
    return tuple(View(side=side, form="root", tensor=state[f"{side}_root"]) for side in ("A", "G"))


def _pairs(
    state: State, names: Sequence[str], factors: Sequence[Tensor], dampings: Sequence[Tensor]
) -> tuple[View, ...]:
    """Factors with what is added to each and their inverses."""
    return tuple(
        factor_view(name, factor, damping=damping, inverse=state.get(f"{side}_inverse"))
        for name, side, factor, damping in zip(names, "AG", factors, dampings, strict=False)
    )


def _blocks(state: State, damping: float | None, *, relative: bool = False) -> View:
    """F of norms. relative: to each block's largest eigenvalue."""
    blocks, inverse = state["F"], state.get("F_inverse")
    if not damping:
        return View(side="F", form="blocks", tensor=blocks, damping=None)
    added = _like(damping, blocks)
    if relative:
        added = (added * torch.linalg.eigvalsh(blocks.double())[:, -1].to(blocks)).clamp(min=FLOOR)
    return View(side="F", form="blocks", tensor=blocks, damping=added, inverse=inverse)


def _diagonal(name: str, state: State, damping: float | None) -> View:
    added = _like(damping, state[name]) if damping else None
    return View(side=name, form="diagonal", tensor=state[name], damping=added)


def _thin_inverse(state: State, view: View) -> Tensor | None:
    """As it is stored, or formed from Z."""
    if view.inverse is not None or f"{view.side}_z" not in state:
        return view.inverse
    return woodbury.materialised(state[f"{view.side}_z"].double(), state[f"{view.side}_gamma"])


def _like(value: float, tensor: Tensor) -> Tensor:
    return tensor.new_full((), value)
