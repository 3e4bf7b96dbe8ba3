"""The statistics of one match from the tensors of its uses: the canonical form that methods read.

Enters: values of `a`, `g` and operands of every use. Leaves: A, G or F, computed when a method asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kfac_fx import gram
from kfac_fx.layers.kind import LayerKind
from kfac_fx.types import LayerMatch, Sharing, Use


@final
@dataclass(frozen=True, kw_only=True)
class UseValues:
    """Values of one use's nodes. g: one tensor per backward pass that feeds the Fisher."""

    use: Use
    a: Tensor | None
    operands: tuple[Tensor, ...]
    g: tuple[Tensor, ...]


@final
@dataclass(frozen=True, kw_only=True)
class MatchStatistics:
    """`Statistics` of a match (see `kfac_fx.contracts.Statistics`).

    kinds: layer kind of each use, by name. kept: [N, R'], 0 for ignored loss terms; layers whose rows are those terms leave
    them out of A.
    """

    match: LayerMatch
    uses: tuple[UseValues, ...]
    kinds: Mapping[str, LayerKind]
    inverse_scale: Tensor
    sharing: Sharing
    kept: Tensor | None = None

    @property
    def structure(self) -> str:
        """The match's structure."""
        return self.match.structure

    def input_moment(self) -> Tensor:
        """A: [groups, d_in, d_in]; [d_in] for a diagonal structure."""
        if self._tied:
            return self._tied_moments()[0]
        if self.structure == "diagonal":
            return self._frequencies(self.uses)
        return self._input_moment(self.uses)

    def output_moment(self) -> Tensor:
        """G: [groups, d_out, d_out]."""
        if self._tied:
            return self._tied_moments()[1]
        return self._output_moment(self.uses)

    def blocks(self) -> Tensor:
        """F: [channels, k, k] with k = 1, or 2 for (scale, shift)."""
        rows = []
        for values in self.uses:
            kind, use = self._kind(values.use), values.use
            x = None if values.a is None else kind.input_rows(use, values.a, values.operands)
            for g in values.g:
                g_rows = self._scaled(values, g)
                shift = g_rows.sum(1)
                if x is None:
                    rows.append(shift.unsqueeze(-1))
                    continue
                scale = (g_rows * x.to(g_rows.dtype)).sum(1)
                if self.match.bias is not None and not use.bias:
                    shift = torch.zeros_like(shift)
                parts = [scale, shift] if self.match.bias is not None else [scale]
                rows.append(torch.stack(parts, -1))
        return gram.block_moment(rows, self.inverse_scale)

    @property
    def _tied(self) -> bool:
        return any(values.use.options.get("swapped", False) for values in self.uses)

    def _kind(self, use: Use) -> LayerKind:
        return self.kinds[use.options["kind"]]

    def _input_rows(self, values: UseValues) -> gram.InputRows:
        assert values.a is not None
        rows = self._kind(values.use).input_rows(values.use, values.a, values.operands)
        aligned = self.kept is not None and rows.shape[1:3] == self.kept.shape and rows.shape[2] > 1
        return gram.InputRows(rows=rows, ones=values.use.bias, kept=self.kept if aligned else None)

    def _input_moment(self, uses: tuple[UseValues, ...]) -> Tensor:
        rows = [self._input_rows(values) for values in uses]
        return gram.input_moment(rows, sharing=self.sharing, bias=self.match.bias is not None)

    def _frequencies(self, uses: tuple[UseValues, ...]) -> Tensor:
        assert uses[0].a is not None
        indices = [self._kind(u.use).input_rows(u.use, u.a, u.operands) for u in uses if u.a is not None]
        return gram.frequencies(
            indices,
            size=self.match.d_in,
            padding_idx=uses[0].use.options["padding_idx"],
            dtype=gram.statistics_dtype(uses[0].g[0].dtype),
        )

    def _scaled(self, values: UseValues, g: Tensor) -> Tensor:
        rows = self._kind(values.use).output_rows(values.use, g, values.operands)
        return rows if values.use.scale == 1.0 else rows * values.use.scale

    def _output_rows(self, uses: tuple[UseValues, ...]) -> list[Tensor]:
        """One entry per use and pass.

        Uses of one pass are joined over positions where positions are summed.
        """
        per_use = [[self._scaled(values, g) for g in values.g] for values in uses]
        if self.sharing == "expand":
            return [rows for passes in per_use for rows in passes]
        return [torch.cat(passes, 2) for passes in zip(*per_use, strict=True)]

    def _output_moment(self, uses: tuple[UseValues, ...]) -> Tensor:
        return gram.output_moment(self._output_rows(uses), self.inverse_scale, sharing=self.sharing)

    def _tied_moments(self) -> tuple[Tensor, Tensor]:
        """One Kronecker product for uses of opposite orientation: the partial traces of the sum of their
        blocks.

        in = sum_u in_u tr(out_u); out = sum_u out_u tr(in_u) / sum_u tr(in_u) tr(out_u), where (in_u, out_u)
        are (A_u, G_u) or, for a swapped use, (G_u, A_u). The trace of the sum is kept. Embedding and head:
        `in` is a vector.
        """
        sides = []
        for values in self.uses:
            one = (values,)
            swapped = values.use.options.get("swapped", False)
            if self.structure == "diagonal" and swapped:
                inner = gram.output_diagonal(self._output_rows(one), self.inverse_scale)
                sides.append((inner, self._input_moment(one)))
            elif self.structure == "diagonal":
                sides.append((self._frequencies(one), self._output_moment(one)))
            elif swapped:
                sides.append((self._output_moment(one), self._input_moment(one)))
            else:
                sides.append((self._input_moment(one), self._output_moment(one)))
        traces = [(_trace(inner), _trace(outer)) for inner, outer in sides]
        total = torch.stack([ti * to for ti, to in traces]).sum()
        tiny = torch.finfo(total.dtype).tiny
        inner = torch.stack([i * to for (i, _), (_, to) in zip(sides, traces, strict=True)]).sum(0)
        outer = torch.stack([o * ti for (_, o), (ti, _) in zip(sides, traces, strict=True)]).sum(0)
        return inner, outer / total.clamp(min=tiny)


def _trace(factor: Tensor) -> Tensor:
    return factor.sum() if factor.dim() == 1 else factor.diagonal(dim1=-2, dim2=-1).sum()
