"""The statistics of one match from the tensors of its uses: the canonical form that methods read.

Enters: values of `a`, `g` and operands of every use. Leaves: factors, rows or squares, computed when a method
asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kfac_fx import autocorrelation, gram, rows
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

    @property
    def positions(self) -> tuple[int, ...]:
        """T of each use."""
        return tuple(self._scaled(values, values.g[0]).shape[2] for values in self._oriented(False))

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
        outputs = self._output_rows(self._oriented(swapped))
        if self.structure == "diagonal" and swapped:
            return gram.output_diagonal(outputs, self.inverse_scale)
        sharing = "expand" if self.structure == "diagonal" else self.sharing  # one-hot rows do not average
        return gram.output_moment(outputs, self.inverse_scale, sharing=sharing)

    def blocks(self) -> Tensor:
        """F: [channels, k, k] with k = 1, or 2 for (scale, shift)."""
        per_use = []
        for values in self.uses:
            kind, use = self._kind(values.use), values.use
            x = None if values.a is None else kind.input_rows(use, values.a, values.operands)
            for g in values.g:
                g_rows = self._scaled(values, g)
                shift = g_rows.sum(1)
                if x is None:
                    per_use.append(shift.unsqueeze(-1))
                    continue
                scale = (g_rows * x.to(g_rows.dtype)).sum(1)
                if self.match.bias is not None and not use.bias:
                    shift = torch.zeros_like(shift)
                parts = [scale, shift] if self.match.bias is not None else [scale]
                per_use.append(torch.stack(parts, -1))
        return gram.block_moment(per_use, self.inverse_scale)

    def input_rows(self, *, reduced: bool, positions: Sequence[Tensor] | None = None) -> Tensor:
        """Rows X with X^T X = A: [groups, m, d_in]."""
        uses, bias = self._oriented(False), self.match.bias is not None
        if reduced:
            return gram.reduced_rows([self._position_sums(values) for values in uses], bias=bias)
        return rows.input_rows([self._input_rows(v) for v in uses], bias=bias, positions=positions)

    def output_rows(self, *, reduced: bool, positions: Sequence[Tensor] | None = None) -> Tensor:
        """Rows X with X^T X = G: [groups, m, d_out]."""
        uses = self._oriented(False)
        per_use = [[self._gradient_rows(values, g) for g in values.g] for values in uses]
        if reduced:
            joined = [torch.cat(passes, 2) for passes in zip(*per_use, strict=True)]
            return rows.output_rows(joined, self.inverse_scale, reduced=True)
        flat = [g for passes in per_use for g in passes]
        if positions is not None:
            positions = [p for p, passes in zip(positions, per_use, strict=True) for _ in passes]
        return rows.output_rows(flat, self.inverse_scale, reduced=False, positions=positions)

    def squared_projections(self, input_basis: Tensor | None, output_basis: Tensor | None) -> Tensor:
        """Squares of per-example gradients in a basis, summed: [groups, d_out, d_in]."""
        total = None
        for number in range(len(self.uses[0].g)):
            square = self._squares_of_pass(number, input_basis, output_basis)
            total = square if total is None else total + square
        assert total is not None
        return total * self.inverse_scale.to(total.dtype)

    def _squares_of_pass(
        self, number: int, input_basis: Tensor | None, output_basis: Tensor | None
    ) -> Tensor:
        if self.structure == "diagonal" and not self.match.tied:
            lookups = []
            for values in self.uses:
                assert values.a is not None
                index = self._kind(values.use).input_rows(values.use, values.a, values.operands)
                lookups.append((index, self._gradient_rows(values, values.g[number])))
            padding_idx = self.uses[0].use.options["padding_idx"]
            return rows.squared_projections_of_indices(
                lookups, output_basis, size=self.match.d_in, padding_idx=padding_idx
            )
        pairs = [self._factors_of_gradients(values, number) for values in self.uses]
        return rows.squared_projections(pairs, input_basis, output_basis, bias=self.match.bias is not None)

    def _factors_of_gradients(self, values: UseValues, number: int) -> tuple[gram.InputRows, Tensor]:
        """Rows whose products are the gradients: (a, g), or (g, a) of a use of opposite orientation."""
        g_rows = self._gradient_rows(values, values.g[number])
        if values.use.options.get("swapped", False):
            return gram.InputRows(rows=g_rows, ones=False), self._input_rows(values).rows
        if self.structure != "diagonal":
            return self._input_rows(values), g_rows
        assert values.a is not None
        index = self._kind(values.use).input_rows(values.use, values.a, values.operands)
        words = torch.arange(self.match.d_in, device=index.device)
        words = torch.where(words == values.use.options["padding_idx"], -1, words)
        hot = index.reshape(*g_rows.shape[:3], 1) == words
        return gram.InputRows(rows=hot.to(g_rows.dtype), ones=False), g_rows

    def channel_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and second moment of a convolution's input channels."""
        moments = []
        for values in self.uses:
            assert values.a is not None and values.use.geometry is not None
            moments.append(rows.channel_moments(self._precise(values.a), values.use.geometry))
        means, seconds = (torch.stack(parts).mean(0) for parts in zip(*moments, strict=True))
        return means, seconds

    def _oriented(self, swapped: bool) -> tuple[UseValues, ...]:
        return tuple(values for values in self.uses if values.use.options.get("swapped", False) is swapped)

    def _kind(self, use: Use) -> LayerKind:
        return self.kinds[use.options["kind"]]

    def _input_rows(self, values: UseValues) -> gram.InputRows:
        assert values.a is not None
        a = self._kind(values.use).input_rows(values.use, values.a, values.operands)
        return gram.InputRows(rows=self._precise(a), ones=values.use.bias, kept=self._kept(values))

    def _position_sums(self, values: UseValues) -> gram.PositionSums:
        """Of all rows, also those of ignored terms."""
        geometry, a = values.use.geometry, values.a
        assert a is not None
        if geometry is not None:
            return autocorrelation.position_sums(self._precise(a), geometry, ones=values.use.bias)
        a = self._precise(self._kind(values.use).input_rows(values.use, a, values.operands))
        return gram.sums_of_rows(gram.InputRows(rows=a, ones=values.use.bias))

    def _moment(self, values: UseValues) -> gram.InputMoment:
        geometry, kept = values.use.geometry, self._kept(values)
        if geometry is None:
            return gram.moment_of_rows(self._input_rows(values))
        assert values.a is not None
        form, ones = values.use.options["form"], values.use.bias
        a = self._precise(values.a)
        if kept is not None:
            return autocorrelation.masked_moment(a, geometry, form=form, ones=ones, kept=kept)
        return autocorrelation.input_moment(a, geometry, form=form, ones=ones)

    def _kept(self, values: UseValues) -> Tensor | None:
        """1 for rows with a gradient in some pass of some reader of the input, else 0: [N, T]. None: all."""
        if not self.ignores or self.sharing == "reduce" or self._scaled(values, values.g[0]).shape[2] == 1:
            return None
        place = next(i for i, own in enumerate(self.uses) if own is values)
        alike = [values, *(uses[place] for uses in self.readers)]
        seen = [self._kind(v.use).output_rows(v.use, g, v.operands) for v in alike for g in v.g]
        return torch.stack([g_rows.abs().amax((0, -1)) for g_rows in seen]).amax(0) != 0

    def _input_moment(self, uses: tuple[UseValues, ...]) -> Tensor:
        bias = self.match.bias is not None
        if self.sharing == "reduce" and self.structure != "diagonal":
            return gram.gram(gram.reduced_rows([self._position_sums(values) for values in uses], bias=bias))
        return gram.input_moment([self._moment(values) for values in uses], bias=bias)

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
