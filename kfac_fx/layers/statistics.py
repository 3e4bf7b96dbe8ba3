"""The statistics of one match from the tensors of its uses: the canonical form that methods read.

Enters: values of `a`, `g` and operands of every use. Leaves: factors, rows or squares, computed when a method
asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kfac_fx import autocorrelation, gram, rows, squares
from kfac_fx.layers.readings import MatchReadings, UseValues


@final
@dataclass(frozen=True, kw_only=True)
class MatchStatistics(MatchReadings):
    """`Statistics` of a match (see `kfac_fx.contracts.Statistics`)."""

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
                shift = _over_positions(g_rows)
                if x is None:
                    per_use.append([shift])
                    continue
                scale = _over_positions(g_rows * x.to(g_rows.dtype))
                if self.match.bias is not None and not use.bias:
                    shift = torch.zeros_like(shift)
                per_use.append([scale, shift] if self.match.bias is not None else [scale])
        return gram.block_moment(per_use, self.inverse_scale)

    def input_rows(self, *, reduced: bool, positions: Sequence[Tensor] | None = None) -> Tensor:
        """Rows X with X^T X = A: [groups, m, d_in]."""
        uses, bias = self._oriented(False), self.match.bias is not None
        if reduced:
            return gram.reduced_rows([self._position_sums(values) for values in uses], bias=bias)
        if positions is None:
            return rows.input_rows([self._input_rows(v) for v in uses], bias=bias)
        marks = [self._kept(values) for values in uses]
        drawn = zip(uses, positions, marks, strict=True)
        count = rows.total_count(
            [(self.match.examples * t, k) for t, k in zip(self.positions, marks, strict=True)]
        )
        chosen = [self._rows_at(values, index, kept) for values, index, kept in drawn]
        return rows.weighted_rows(chosen, self.positions, count, bias=bias)

    def field_rows(self, *, reduced: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Patches summed over the kernel, and what A has in all and in its last entry."""
        if reduced:
            found, bias = self.input_rows(reduced=True), self.match.bias is not None
            return rows.reduced_field_rows(found, volume=self.match.kernel_volume, bias=bias)
        read = []
        for values in self._oriented(False):
            assert values.a is not None and values.use.geometry is not None
            a = self._precise(values.a)
            read.append((a, values.use.geometry, values.use.bias, self._kept(values)))
        return rows.field_rows(read)

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
        if self.structure == "diagonal" and not self.match.tied:
            total = self._squares_of_lookups(output_basis)
        else:
            parts = [self._gradient_parts(values) for values in self.uses]
            examples = self._scaled(self.uses[0], self.uses[0].g[0]).shape[1]
            total = squares.squared_projections(
                parts, input_basis, output_basis, bias=self.match.bias is not None, examples=examples
            )
        return total * self.inverse_scale.to(total.dtype)

    def _squares_of_lookups(self, output_basis: Tensor | None) -> Tensor:
        """Of an embedding, all passes."""
        per_use = []
        for values in self.uses:
            assert values.a is not None
            index = self._kind(values.use).input_rows(values.use, values.a, values.operands)
            per_use.append([(index, self._gradient_rows(values, g)) for g in values.g])
        sizes = {"size": self.match.d_in, "padding_idx": self.uses[0].use.options["padding_idx"]}
        found = [
            squares.squared_projections_of_indices(lookups, output_basis, **sizes)
            for lookups in zip(*per_use, strict=True)
        ]
        return sum(found[1:], start=found[0])

    def _gradient_parts(self, values: UseValues) -> squares.GradientParts:
        """Rows whose products are the gradients, with those of each pass."""
        outputs, geometry = [self._gradient_rows(values, g) for g in values.g], values.use.geometry
        if geometry is None:
            return squares.parts_of_rows(self._factors_of_gradients(values, outputs))
        assert values.a is not None
        a, kept = self._precise(values.a), self._kept(values)
        return squares.parts_of_patches(a, geometry, outputs, ones=values.use.bias, kept=kept)

    def _factors_of_gradients(
        self, values: UseValues, outputs: Sequence[Tensor]
    ) -> list[tuple[gram.InputRows, Tensor]]:
        """(a, g) of each pass, or (g, a) of a use of opposite orientation."""
        if values.use.options.get("swapped", False):
            a = self._input_rows(values).rows
            return [(gram.InputRows(rows=g_rows, ones=False), a) for g_rows in outputs]
        if self.structure != "diagonal":
            use = self._input_rows(values)
            return [(use, g_rows) for g_rows in outputs]
        assert values.a is not None
        index = self._kind(values.use).input_rows(values.use, values.a, values.operands)
        words = torch.arange(self.match.d_in, device=index.device)
        words = torch.where(words == values.use.options["padding_idx"], -1, words)
        hot = index.reshape(*outputs[0].shape[:3], 1) == words
        use = gram.InputRows(rows=hot.to(outputs[0].dtype), ones=False)
        return [(use, g_rows) for g_rows in outputs]

    def channel_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and second moment of a convolution's input channels."""
        moments = []
        for values in self.uses:
            assert values.a is not None and values.use.geometry is not None
            moments.append(rows.channel_moments(self._precise(values.a), values.use.geometry))
        means, seconds = (torch.stack(parts).mean(0) for parts in zip(*moments, strict=True))
        return means, seconds

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


def _over_positions(rows: Tensor) -> Tensor:
    """Sums over the positions of each row: [rows, positions, channels] -> [rows, channels]."""
    return rows.squeeze(1) if rows.shape[1] == 1 else rows.sum(1)
