"""What a layer's factors are in numbers: shapes, bytes, FLOPs, and the record of one side for the plan.

Enters: a match. Leaves: Python numbers. One multiply-add counts 2. methods.md sections 0 and 16.6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from kfac_fx.forms import costs, words
from kfac_fx.graph import shape
from kfac_fx.types import FactorSpec, LayerMatch, Use


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
        options = match.uses[0].options
        why = "the loss may ignore positions: " if options.get("masked", False) else ""
        return "box sums" if match.sharing == "reduce" else why + words(options["form"], geometry)
    return "rows^T rows"


def moment_flops(match: LayerMatch, side: str) -> int:
    """FLOPs of one batch's second moment; of a convolution's input in the form that was chosen.

    With the bias column, whose products are sums. methods.md 1.3, 16.6.
    """
    if match.sharing == "reduce" and match.structure == "kronecker":
        return _reduced_flops(match, side)
    if side != "A" or match.uses[0].geometry is None:
        return row_flops(match, side)
    return sum(_form_flops(use, match) for use in match.uses)


def _form_flops(use: Use, match: LayerMatch) -> int:
    """Of one use of a convolution's input: a product of its rows, or what `forms` says."""
    geometry, form = use.geometry, use.options["form"]
    assert geometry is not None
    if form in ("pixels", "patches"):
        positions = math.prod(shape(use.g[0])[2:])
        return 2 * match.examples * positions * match.groups * (match.channels * match.kernel_volume) ** 2
    found = costs(geometry, examples=match.examples, channels=match.groups * match.channels)
    return next(cost.flops for cost in found if cost.form == form)


def _reduced_flops(match: LayerMatch, side: str) -> int:
    """The sum over positions, then 2 d^2 per example and group."""
    d, passes = (match.d_in, 1) if side == "A" else (match.d_out, match.num_passes)
    added = (match.rows - match.examples) * match.groups * d
    if side == "A" and match.uses[0].geometry is not None:
        added = match.examples * sum(_box_additions(use, match) for use in match.uses)
    return passes * (added + 2 * match.examples * match.groups * d**2)


def _box_additions(use: Use, match: LayerMatch) -> int:
    """Additions of one example's box sums: axis after axis, each tap adds the lines that it reads."""
    geometry = use.geometry
    assert geometry is not None
    space, total = geometry.space, 0
    read = space if geometry.transposed else shape(use.g[0])[2:]  # by one tap along an axis, at the most
    for axis, count in enumerate(read):
        total += math.prod(geometry.kernel[: axis + 1]) * count * math.prod(space[axis + 1 :])
    return match.groups * match.channels * total


def row_flops(match: LayerMatch, side: str) -> int:
    """FLOPs of a product of d^2 with every row: 2 rows d^2 per group; counts are one each.

    Of chosen experts too: their rows are zero where another is chosen.
    """
    if side == "F":
        return match.rows * 2 * match.groups * (1 if match.bias is None else 4)
    if side == "A" and match.structure == "diagonal":
        return match.rows
    passes = 1 if side == "A" else match.num_passes
    return passes * match.rows * 2 * match.groups * (match.d_in if side == "A" else match.d_out) ** 2


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
