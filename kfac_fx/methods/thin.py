"""How SKFAC keeps a side of a layer: a vector, a dense factor, or thin rows with one of two inverses.

`Rows` says what the rows of a layer are, `Side` what is kept of them; the functions read and write it.
methods.md 4.4 (strategies, rule for choosing the representation), 4.5 and 16.2 (costs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from kfac_fx import woodbury
from kfac_fx.linalg import join_orientations
from kfac_fx.methods.base import identity, zeros
from kfac_fx.methods.costs import moment_flops
from kfac_fx.types import LayerMatch, State

Form = Literal["diagonal", "dense", "materialised", "implicit"]
Strategy = Literal["reduce", "subsample", "receptive_field"]


@final
@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the rows of one layer are.

    reduced: one per example, not one per position. subsampled: of some positions only. by_field: inputs are
    summed over the kernel. num: rows per pass of the batch that lays out the state.
    """

    reduced: bool = False
    subsampled: bool = False
    by_field: bool = False
    num: int = 0

    @staticmethod
    def of(match: LayerMatch, strategy: Strategy, positions: int) -> Rows:
        """By the strategy for convolutions, by the sharing mode for other layers."""
        rows, examples = match.laid_out
        convolution = match.uses[0].geometry is not None
        if convolution and strategy == "subsample":
            return Rows(subsampled=True, num=min(rows, examples * len(match.uses) * positions))
        reduced = match.sharing == "reduce" or (convolution and strategy == "reduce")
        if reduced and match.structure != "diagonal":
            rows = examples
        return Rows(
            reduced=reduced and match.structure != "diagonal",
            by_field=strategy == "receptive_field" and match.kernel_volume > 1,
            num=rows,
        )


@final
@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a layer.

    name: "A" or "G". dim: d, the side length of the factor (the length of the vector). groups: how many such
    factors. block: rows of one batch. window: blocks kept. other: rows (for "A") or columns (for "G") of the
    gradient that the inverse is applied to, per group. corner: whether the bias has its own 1x1 factor.
    """

    name: Literal["A", "G"]
    dim: int
    groups: int
    block: int
    window: int
    other: int
    diagonal: bool = False
    dense: bool = False
    corner: bool = False

    @property
    def columns(self) -> int:
        """Columns m of U."""
        return self.block * self.window

    @property
    def form(self) -> Form:
        """Implicit while m < d/2, since 4 m d then is less than 2 d^2; no m x m matrix beyond d x d."""
        if self.diagonal:
            return "diagonal"
        if self.dense or self.columns >= self.dim:
            return "dense"
        return "implicit" if 2 * self.columns < self.dim else "materialised"

    @property
    def thin(self) -> bool:
        """Whether rows are kept."""
        return self.form in ("implicit", "materialised")

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of what a batch contributes."""
        own = f"{self.name}_rows" if self.thin else self.name
        return (own, f"{self.name}_bias") if self.corner else (own,)

    def state(self, *, dtype: torch.dtype, device: torch.device) -> State:
        """No curvature yet, and the identity as its inverse."""
        name, options = self.name, {"dtype": dtype, "device": device}
        rows = (self.groups, self.columns, self.dim)
        matrix = (self.dim,) if self.form == "diagonal" else (self.groups, self.dim, self.dim)
        sizes = {f"{name}_rows": rows, f"{name}_weights": (self.window,)} if self.thin else {name: matrix}
        sizes |= {f"{name}_z": rows} if self.form == "implicit" else {}
        sizes |= {f"{name}_bias": (self.groups,)} if self.corner else {}
        state = zeros(sizes, **options)
        if self.corner:
            state[f"{name}_bias_inverse"] = torch.ones(self.groups, **options)
        if self.form == "implicit":
            return state | {f"{name}_gamma": torch.ones(self.groups, **options)}
        return state | {f"{name}_inverse": identity(matrix, **options)}

    def statistics_flops(self, match: LayerMatch) -> int:
        """One addition for every entry of the rows, and 2 m d^2 where they are multiplied."""
        if not self.thin and match.uses[0].geometry is None:
            return moment_flops(match, self.name)
        entries = match.rows * (match.d_in if self.name == "A" else match.num_passes * match.d_out)
        return self.groups * (entries + (0 if self.thin else 2 * self.block * self.dim**2))

    @property
    def refresh_flops(self) -> int:
        """m^3 + 3 m^2 d for Z, and 2 m d^2 if the inverse is formed; d^3 by Cholesky for a dense factor."""
        m, d = self.columns, self.dim
        if self.form == "diagonal":
            return 2 * d
        if self.form == "dense":
            return self.groups * d**3
        return self.groups * (m**3 + 3 * m**2 * d + (2 * m * d**2 if self.form == "materialised" else 0))

    @property
    def apply_flops(self) -> int:
        """4 m d per row of the other side, or 2 d^2 with a dense inverse; d for a vector."""
        per_row = {"diagonal": self.dim, "implicit": 4 * self.columns * self.dim}
        return self.groups * self.other * per_row.get(self.form, 2 * self.dim**2)


def thin_or_dense(side: str, rows: Tensor, names: Sequence[str]) -> State:
    """The statistic of one side that is among `names`: the rows, or X^T X."""
    if f"{side}_rows" in names:
        return {f"{side}_rows": woodbury.compressed(rows)}
    return {side: rows.mT @ rows}


def scaled_field(summed: Tensor, trace: Tensor, *, volume: int) -> Tensor:
    """Rows of c A_rf. summed: rows of A_rf, patches summed over the kernel's `volume` taps: [groups, m, C].

    A is approximated by (c A_rf) (x) I, and c = tr(A) / (volume tr(A_rf)) keeps the trace of the weights'
    part. methods.md 4.4, strategy S3.
    """
    of_sums = (summed**2).sum((1, 2))
    match_traces = (trace / (volume * of_sums)).masked_fill(~(of_sums > 0), 1.0)
    return summed * match_traces.sqrt()[:, None, None]


def applied_left(state: State, gradient: Tensor) -> Tensor:
    """G^-1 grad in the form that the state holds. gradient: [groups, d_out, d_in]."""
    if "G_inverse" in state:
        return state["G_inverse"] @ gradient.to(state["G_inverse"].dtype)
    return woodbury.apply_left(gradient.to(state["G_z"].dtype), state["G_z"], state["G_gamma"])


def applied_right(state: State, gradient: Tensor) -> Tensor:
    """The product grad A^-1 in the form that the state holds. gradient: [groups, d_out, d_in].

    Where A is of channels alone: for every offset of the kernel, and the bias by itself.
    """
    size = state["A_inverse" if "A_inverse" in state else "A_z"].shape[-1]
    if size == gradient.shape[-1]:
        return _times_inverse(state, gradient)
    groups, d_out = gradient.shape[:2]
    bias = "A_bias_inverse" in state
    inner = gradient[..., :-1] if bias else gradient
    by_offset = inner.unflatten(-1, (size, -1)).transpose(2, 3)
    rows = _times_inverse(state, by_offset.reshape(groups, -1, size))
    back = rows.reshape(groups, d_out, -1, size).transpose(2, 3).flatten(2)
    if not bias:
        return back
    return torch.cat([back, gradient[..., -1:] * state["A_bias_inverse"][:, None, None]], -1)


def _times_inverse(state: State, gradient: Tensor) -> Tensor:
    """The product grad A^-1 along the axis of A."""
    if "A_inverse" not in state:
        return woodbury.apply_right(gradient, state["A_z"], state["A_gamma"])
    inverse = state["A_inverse"]
    return gradient * inverse if inverse.dim() == 1 else gradient @ inverse


def current_factors(state: State) -> tuple[Tensor, ...]:
    """(A, G): rows of the window's average for thin sides, else second moments (of both orientations)."""
    if "A_swapped" in state:
        return join_orientations(state["A"], state["G"], state["A_swapped"], state["G_swapped"])
    return tuple(
        woodbury.averaged_rows(state[f"{name}_rows"], state[f"{name}_weights"])
        if f"{name}_rows" in state
        else state[name]
        for name in "AG"
    )


def refresh_sides(
    states: Mapping[str, State],
    new: dict[str, State],
    factors: Mapping[str, Sequence[Tensor]],
    dampings: Mapping[str, Sequence[Tensor]],
) -> Tensor | int:
    """Write Z and gamma, or the inverse, of thin sides into `new`; returns how many kept their last ones.

    factors, dampings: of A and of G by layer. The inverse of a bias by itself is written too.
    """
    for key, state in states.items():
        if "A_bias" in state:
            new[key]["A_bias_inverse"] = 1 / (state["A_bias"] + dampings[key][0])
    pairs = {key: zip("AG", factors[key], dampings[key], strict=True) for key in states}
    sides = [(key, *side) for key, pair in pairs.items() for side in pair if f"{side[0]}_rows" in states[key]]
    solved = woodbury.thin_inverses([side[2] for side in sides], [side[3] for side in sides])
    kept: Tensor | int = 0
    for (key, name, rows, damping), (z, usable) in zip(sides, solved, strict=True):
        state, kept = states[key], kept + (~usable).sum()
        choose = usable[:, None, None]
        if f"{name}_inverse" in state:
            inverse = woodbury.materialised(z, damping).to(rows.dtype)
            new[key][f"{name}_inverse"] = torch.where(choose, inverse, state[f"{name}_inverse"])
            continue
        last = state[f"{name}_z"]
        size = max(last.shape[1], z.shape[1])
        z, last = woodbury.padded(z.to(rows.dtype), size), woodbury.padded(last, size)
        new[key][f"{name}_z"] = torch.where(choose, z, last)
        new[key][f"{name}_gamma"] = torch.where(usable, damping, state[f"{name}_gamma"])
    return kept
