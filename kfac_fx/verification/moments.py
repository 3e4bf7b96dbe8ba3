"""Statistics of one batch from explicit rows: second moments with the normalisation of methods.md 1.3.

Enters: rows, 1/R_. Leaves: the tensors that a method's `batch_statistics` should return, or why there is no
independent formula. float64 throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kfac_fx.contracts import Method
from kfac_fx.methods import SKFAC, Diagonal
from kfac_fx.methods.base import KroneckerFactored
from kfac_fx.types import LayerMatch, Sharing, State
from kfac_fx.verification.rows import BlockRows, UseRows


@final
@dataclass(frozen=True, kw_only=True)
class Moments:
    """Explicit statistics of one layer.

    inverse_scale: 1/R_. sharing: for this layer's rows. kept: per use which rows count, [N, T], None for all.
    """

    match: LayerMatch
    uses: Sequence[UseRows]
    inverse_scale: float
    sharing: Sharing
    kept: Sequence[Tensor | None]

    @property
    def bias(self) -> bool:
        """Whether the layer has a column of ones."""
        return self.match.bias is not None

    def oriented(self, swapped: bool) -> list[tuple[UseRows, Tensor | None]]:
        """Uses of one orientation of the weight."""
        pairs = zip(self.uses, self.kept, strict=True)
        return [(use, kept) for use, kept in pairs if use.swapped is swapped]

    def A(self, *, swapped: bool = False) -> Tensor:
        """[groups, d_in, d_in]; the diagonal alone, [d_in], of a lookup."""
        uses = self.oriented(swapped)
        if self.match.structure == "diagonal" and not swapped:
            count = sum(use.num * use.positions for use, _ in uses)
            hits = [
                use.inputs(part, bias=False).double().sum((0, 1, 2))
                for use, _ in uses
                for part in use.slices()
            ]
            return torch.stack(hits).sum(0) / count
        if self.sharing == "reduce" and self.match.structure != "diagonal":
            return self._reduced_input(uses)
        total, count = [], 0.0
        for use, kept in uses:
            for part in use.slices():
                a = use.inputs(part, bias=self.bias).double()
                if kept is not None:
                    a = a * kept[part].double().unsqueeze(-1)
                total.append(torch.einsum("gnti,gntj->gij", a, a))
            count += use.num * use.positions if kept is None else float(kept.sum())
        return torch.stack(total).sum(0) / max(count, 1)

    def _reduced_input(self, uses: list[tuple[UseRows, Tensor | None]]) -> Tensor:
        positions = sum(use.positions for use, _ in uses)
        sums = [
            torch.cat([use.inputs(part, bias=self.bias).double().sum(2) for part in use.slices()], 1)
            for use, _ in uses
        ]
        mean = torch.stack(sums).sum(0) / positions
        return torch.einsum("gni,gnj->gij", mean, mean) / mean.shape[1]

    def G(self, *, swapped: bool = False) -> Tensor:
        """[groups, d_out, d_out]; the diagonal alone of the table's side of a transposed use."""
        uses = [use for use, _ in self.oriented(swapped)]
        passes = len(uses[0].fisher)
        if self.match.structure == "diagonal" and swapped:
            flat = [use.fisher[i].double() for i in range(passes) for use in uses]
            return torch.stack([(g**2).sum((0, 1, 2)) for g in flat]).sum(0) * self.inverse_scale
        total = []
        for i in range(passes):
            rows = [use.fisher[i].double() for use in uses]
            if self.sharing == "reduce" and self.match.structure != "diagonal":
                rows = [torch.stack([g.sum(2) for g in rows]).sum(0).unsqueeze(2)]
            total += [torch.einsum("gnti,gntj->gij", g, g) for g in rows]
        return torch.stack(total).sum(0) * self.inverse_scale

    def S(self, input_basis: Tensor | None, output_basis: Tensor | None) -> Tensor:
        """Sum over examples and passes of (Q_G^T J Q_A)^2 / R_, J of whole examples."""
        total = []
        for i in range(len(self.uses[0].fisher)):
            per_example = max(self.match.groups * self.match.d_out, self.uses[0].positions) * self.match.d_in
            for part in self.uses[0].slices(per_example=per_example):
                of_uses = [self._example_gradients(use, use.fisher[i], part) for use in self.uses]
                J = torch.stack(of_uses).sum(0)
                J = J if output_basis is None else output_basis.double().mT.unsqueeze(1) @ J
                J = J if input_basis is None else J @ input_basis.double().unsqueeze(1)
                total.append((J**2).sum(1))
        return torch.stack(total).sum(0) * self.inverse_scale

    def _example_gradients(self, use: UseRows, g: Tensor, part: slice) -> Tensor:
        """[groups, n, d_out, d_in]."""
        found = g[:, part].double().mT @ use.inputs(part, bias=self.bias).double()
        return found.mT if use.swapped else found


def block_moments(uses: Sequence[BlockRows], *, bias: bool, inverse_scale: float) -> Tensor:
    """F [channels, k, k] of scales and shifts: positions of a row are summed before the product."""
    total = []
    for use in uses:
        for g in use.fisher:
            rows = use.gradients(g, bias=bias).double()
            total.append(torch.einsum("nci,ncj->cij", rows, rows))
    return torch.stack(total).sum(0) * inverse_scale


def expected_statistic(method: Method, name: str, moments: Moments, state: State) -> Tensor | str:
    """The statistic of that name, or the reason why it is not checked. state: before the batch."""
    if isinstance(method, SKFAC):
        refused = _skfac_refusal(method, moments.match)
        if refused:
            return refused
        name = name.replace("_rows", "")
    if not isinstance(method, KroneckerFactored):
        return f"no independent formula for statistics of {method.name}"
    known: dict[str, Callable[[], Tensor]] = {
        "A": moments.A,
        "G": moments.G,
        "A_swapped": lambda: moments.A(swapped=True),
        "G_swapped": lambda: moments.G(swapped=True),
        "S": lambda: moments.S(state.get("A_basis"), state.get("G_basis")),
    }
    if name not in known:
        return f"no independent formula for {name} of {method.name}"
    return known[name]()


def expected_blocks(method: Method, uses: Sequence[BlockRows], *, bias: bool, inverse_scale: float) -> Tensor:
    """F as the method keeps it: its diagonal for `Diagonal`."""
    found = block_moments(uses, bias=bias, inverse_scale=inverse_scale)
    return found.diagonal(dim1=1, dim2=2) if isinstance(method, Diagonal) else found


def sharing_of(method: Method, match: LayerMatch) -> Sharing:
    """How positions count for this layer; SKFAC reduces convolutions in any case."""
    if isinstance(method, SKFAC) and method.strategy == "reduce" and match.uses[0].geometry is not None:
        return "reduce"
    return match.sharing


def _skfac_refusal(method: SKFAC, match: LayerMatch) -> str:
    convolution = match.uses[0].geometry is not None
    if convolution and (method.strategy != "reduce" or method.scale != "exact"):
        return f"rows of strategy {method.strategy!r}, scale {method.scale!r} have no independent formula"
    return ""
