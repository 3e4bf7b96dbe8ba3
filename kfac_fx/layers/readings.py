"""What the statistics of one match read of the tensors of its uses: rows, and which of them count.

Enters: values of `a`, `g` and operands of every use. Leaves: rows `[groups, examples, positions, features]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kfac_fx import gram, rows, windows
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


@dataclass(frozen=True, kw_only=True)
class MatchReadings:
    """A match with the values of its uses.

    kinds: layer kind of each use, by name. ignores: the loss can ignore terms, so that a row whose gradient
    is zero in every pass is padding and is left out of A (methods.md 1.1). readers: uses of the other layers
    that share A. rounded: rows a and g are rounded to bfloat16 first, except those of scales and shifts.
    """

    match: LayerMatch
    uses: tuple[UseValues, ...]
    kinds: Mapping[str, LayerKind]
    inverse_scale: Tensor
    sharing: Sharing
    ignores: bool = False
    readers: tuple[tuple[UseValues, ...], ...] = ()
    rounded: bool = False

    @property
    def structure(self) -> str:
        """The match's structure."""
        return self.match.structure

    def _oriented(self, swapped: bool) -> tuple[UseValues, ...]:
        return tuple(values for values in self.uses if values.use.options.get("swapped", False) is swapped)

    def _kind(self, use: Use) -> LayerKind:
        return self.kinds[use.options["kind"]]

    def _input_rows(self, values: UseValues) -> gram.InputRows:
        assert values.a is not None
        a = self._kind(values.use).input_rows(values.use, values.a, values.operands)
        return gram.InputRows(rows=self._precise(a), ones=values.use.bias, kept=self._kept(values))

    def _rows_at(self, values: UseValues, index: Tensor, kept: Tensor | None) -> gram.InputRows:
        """The input's rows at some positions alone."""
        geometry = values.use.geometry
        if geometry is None:
            return rows.at_positions(self._input_rows(values), index)
        assert values.a is not None
        found = windows.patches_at(self._precise(values.a), geometry, index)
        marks = None if kept is None else kept.index_select(1, index)
        return gram.InputRows(rows=found, ones=values.use.bias, kept=marks)

    def _position_sums(self, values: UseValues) -> gram.PositionSums:
        """Of all rows, also those of ignored terms."""
        geometry, a = values.use.geometry, values.a
        assert a is not None
        if geometry is not None:
            return windows.position_sums(self._precise(a), geometry, ones=values.use.bias)
        a = self._precise(self._kind(values.use).input_rows(values.use, a, values.operands))
        return gram.sums_of_rows(gram.InputRows(rows=a, ones=values.use.bias))

    def _kept(self, values: UseValues) -> Tensor | None:
        """1 for rows with a gradient in some pass of some reader of the input, else 0: [N, T]. None: all."""
        if not self.ignores or self.sharing == "reduce" or self._scaled(values, values.g[0]).shape[2] == 1:
            return None
        place = next(i for i, own in enumerate(self.uses) if own is values)
        alike = [values, *(uses[place] for uses in self.readers)]
        seen = [self._kind(v.use).output_rows(v.use, g, v.operands) for v in alike for g in v.g]
        extremes = [extreme for g_rows in seen for extreme in (g_rows.amax((0, -1)), g_rows.amin((0, -1)))]
        return (torch.stack(extremes) != 0).any(0)

    def _scaled(self, values: UseValues, g: Tensor) -> Tensor:
        g_rows = self._kind(values.use).output_rows(values.use, g, values.operands)
        return g_rows if values.use.scale == 1.0 else g_rows * values.use.scale

    def _gradient_rows(self, values: UseValues, g: Tensor) -> Tensor:
        return self._precise(self._scaled(values, g))

    def _precise(self, rows: Tensor) -> Tensor:
        """In the precision in which second moments are taken."""
        return gram.rounded(rows) if self.rounded else gram.wide(rows)

    def _output_rows(self, uses: tuple[UseValues, ...]) -> list[Tensor]:
        """One entry per use and pass.

        Uses of one pass are joined over positions where positions are summed.
        """
        per_use = [[self._gradient_rows(values, g) for g in values.g] for values in uses]
        if self.sharing == "expand" or self.structure == "diagonal":
            return [g_rows for passes in per_use for g_rows in passes]
        return [torch.cat(passes, 2) for passes in zip(*per_use, strict=True)]
