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

    kinds: layer kind of each use, by name. ignores: the loss can ignore terms, so that a row whose gradient
    is zero in every pass is padding and is left out of A (methods.md 1.1). readers: uses of the other layers
    that share A.
    """

    match: LayerMatch
    uses: tuple[UseValues, ...]
    kinds: Mapping[str, LayerKind]
    inverse_scale: Tensor
    sharing: Sharing
    ignores: bool = False
    readers: tuple[tuple[UseValues, ...], ...] = ()

    @property
    def structure(self) -> str:
        """The match's structure."""
        return self.match.structure

    def input_moment(self, *, swapped: bool = False) -> Tensor:
        """A: [groups, d_in, d_in]; [d_in] for a diagonal structure. swapped.

        Of the uses of opposite orientation.
        """
        uses = self._oriented(swapped)
        if self.structure == "diagonal" and not swapped:
            return self._frequencies(uses)
        return self._input_moment(uses)

    def output_moment(self, *, swapped: bool = False) -> Tensor:
        """G: [groups, d_out, d_out]. swapped.

        Of the uses of opposite orientation, [d_in] if those are diagonal.
        """
        rows = self._output_rows(self._oriented(swapped))
        if self.structure == "diagonal" and swapped:
            return gram.output_diagonal(rows, self.inverse_scale)
        sharing = "expand" if self.structure == "diagonal" else self.sharing  # one-hot rows do not average
        return gram.output_moment(rows, self.inverse_scale, sharing=sharing)

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

    def _oriented(self, swapped: bool) -> tuple[UseValues, ...]:
        return tuple(values for values in self.uses if values.use.options.get("swapped", False) is swapped)

    def _kind(self, use: Use) -> LayerKind:
        return self.kinds[use.options["kind"]]

    def _input_rows(self, values: UseValues) -> gram.InputRows:
        assert values.a is not None
        rows = self._kind(values.use).input_rows(values.use, values.a, values.operands)
        return gram.InputRows(rows=rows, ones=values.use.bias, kept=self._kept(values, rows.shape[2]))

    def _kept(self, values: UseValues, positions: int) -> Tensor | None:
        """1 for rows with a gradient in some pass of some reader of the input, else 0: [N, T]."""
        if not self.ignores or positions == 1 or self.sharing == "reduce":
            return None
        place = next(i for i, own in enumerate(self.uses) if own is values)
        alike = [values, *(uses[place] for uses in self.readers)]
        seen = [self._kind(v.use).output_rows(v.use, g, v.operands) != 0 for v in alike for g in v.g]
        return torch.stack([rows.any(-1).any(0) for rows in seen]).any(0)

    def _input_moment(self, uses: tuple[UseValues, ...]) -> Tensor:
        rows = [self._input_rows(values) for values in uses]
        sharing = "expand" if self.structure == "diagonal" else self.sharing
        return gram.input_moment(rows, sharing=sharing, bias=self.match.bias is not None)

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
        if self.sharing == "expand" or self.structure == "diagonal":
            return [rows for passes in per_use for rows in passes]
        return [torch.cat(passes, 2) for passes in zip(*per_use, strict=True)]
