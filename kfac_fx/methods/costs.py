"""What a layer's factors are in numbers: shapes, bytes, FLOPs, and the record of one side for the plan.

Enters: a match. Leaves: Python numbers. One multiply-add counts 2. methods.md sections 0 and 16.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kfac_fx.forms import costs, words
from kfac_fx.types import FactorSpec, LayerMatch


def factor_shapes(match: LayerMatch) -> dict[str, tuple[int, ...]]:
    """Shapes of A and G (and of the swapped ones of a tied weight), or of F."""
    if match.structure == "block":
        k = 1 if match.bias is None else 2
        return {"F": (match.groups, k, k)}
    a = (match.d_in,) if match.structure == "diagonal" else (match.groups, match.d_in, match.d_in)
    shapes = {"A": a, "G": (match.groups, match.d_out, match.d_out)}
    if match.tied:
        shapes |= {"A_swapped": shapes["G"], "G_swapped": a}
    return shapes


def spec(
    method: Any,
    match: LayerMatch,
    side: str,
    *,
    dtype: torch.dtype,
    statistics: int,
    refresh: int,
    apply: int,
    form: str | None = None,
    columns: int | None = None,
) -> FactorSpec:
    """The record of one side. Its bytes are those of the tensors that `init` allocates under names that start
    with `side`; what `shared_names` leaves to another layer counts there.

    statistics, refresh, apply: FLOPs each time the phase runs. A shared statistic costs its owner alone, and
    so does a refresh if all that it changes is shared.
    """
    state = method.init(match, dtype=dtype, device=torch.device("meta"))
    borrowed = match.shared_a if side == "A" and match.shared_a != match.key else None
    owned = [
        t for n, t in state.items() if n.startswith(side) and not (borrowed and n in method.shared_names)
    ]
    sizes = factor_shapes(match).get(side, (match.groups * match.d_out * match.d_in,))
    diagonal = len(sizes) == 1
    return FactorSpec(
        owner=match.key,
        side=side,  # type: ignore[arg-type]
        dim=sizes[0] if diagonal else sizes[1],
        count=1 if diagonal else sizes[0],
        diagonal=diagonal,
        dtype=dtype,
        bytes=sum(t.numel() * t.dtype.itemsize for t in owned),
        flops_statistics=0 if borrowed and side in method.shared_names else statistics,
        flops_refresh=refresh if owned else 0,
        flops_apply=apply,
        form=form or statistics_form(match, side),
        shared_with=borrowed if borrowed and side in method.shared_names else None,
        columns=columns,
    )


def statistics_form(match: LayerMatch, side: str) -> str:
    """How a second moment is computed, in words."""
    if side == "S":
        return "squares of projected gradients"
    if side == "F":
        return "products per example"
    if side == "A" and match.structure == "diagonal":
        return "counts"
    geometry = match.uses[0].geometry
    if side == "A" and geometry is not None:
        return "box sums" if match.sharing == "reduce" else words(match.uses[0].options["form"], geometry)
    return "rows^T rows"


def moment_flops(match: LayerMatch, side: str) -> int:
    """FLOPs of one batch's second moment; of a convolution's input in the form that was chosen."""
    if side != "A" or match.uses[0].geometry is None:
        return row_flops(match, side)
    if match.sharing == "reduce":
        return match.examples * match.groups * (match.rows // match.examples + 2 * match.d_in) * match.d_in
    channels = match.groups * match.channels
    return sum(
        cost.flops
        for use in match.uses
        if use.geometry is not None
        for cost in costs(use.geometry, examples=match.examples, channels=channels)
        if cost.form == use.options["form"]
    )


def row_flops(match: LayerMatch, side: str) -> int:
    """FLOPs of a product of d^2 with every row: 2 rows d^2 per group; counts are one each."""
    if side == "F":
        return match.rows * 2 * match.groups * (1 if match.bias is None else 4)
    per_group = match.rows // match.groups if match.kind == "gathered-experts" else match.rows
    if side == "A" and match.structure == "diagonal":
        return match.rows
    passes = 1 if side == "A" else match.num_passes
    return passes * per_group * 2 * match.groups * (match.d_in if side == "A" else match.d_out) ** 2


def product_flops(match: LayerMatch, side: str) -> int:
    """FLOPs of the product of one side with the gradient: 2 d^2 times the other side, d of a diagonal one."""
    if side == "F":
        return match.groups * (2 if match.bias is None else 8)
    if side == "A" and match.structure == "diagonal":
        return match.d_in * match.d_out
    d = match.d_in if side == "A" else match.d_out
    return 2 * match.groups * d * match.d_in * match.d_out


def rotation_flops(match: LayerMatch, side: str) -> int:
    """FLOPs of applying one side through its eigenvectors: there and back. A diagonal one has none."""
    return product_flops(match, side) * (1 if len(factor_shapes(match)[side]) == 1 else 2)


def inverse_flops(sizes: Sequence[int]) -> int:
    """FLOPs of an inverse through Cholesky: d^3 per matrix."""
    return 2 * sizes[0] if len(sizes) == 1 else sizes[0] * sizes[1] ** 3


def eigen_flops(sizes: Sequence[int]) -> int:
    """Nominal FLOPs of a symmetric eigendecomposition: 9 d^3 per matrix, none for a vector."""
    return 0 if len(sizes) == 1 else sizes[0] * 9 * sizes[1] ** 3
