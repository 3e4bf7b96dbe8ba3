"""Batches that wait for `update`: their gradients and statistics as those of one large batch (pitfall P10).

Enters: what a program returned for one batch. Leaves: a frozen `Pending`. Tensors and records only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from kfac_fx.canonical import state_owner
from kfac_fx.curvature import Key
from kfac_fx.planned import Plan
from kfac_fx.types import LayerMatch


@final
@dataclass(frozen=True, kw_only=True)
class Pending:
    """Gradients and statistics of the batches so far.

    weight: their total 1/R_, 0-dim (the number of loss terms of a mean loss). rows: how many the method says
    that each statistic of the input is a mean over; None where rows of ignored terms do not count. finite:
    whether loss and gradients of all of them are, 0-dim; None if that was seen.
    """

    plan: Plan
    weight: Tensor
    gradients: dict[str, Tensor]
    statistics: dict[Key, Tensor]
    rows: dict[Key, int | None]
    finite: Tensor | None = None

    @staticmethod
    def of(
        plan: Plan,
        weight: Tensor,
        gradients: Mapping[str, Tensor],
        statistics: Mapping[Key, Tensor],
        finite: Tensor | None = None,
    ) -> Pending:
        """One batch. weight: 1/R_ of its loss."""
        rows = {
            (state_owner(plan, match, name), name): _num_rows(plan, match, name)
            for match in plan.matched
            for name in plan.method.statistics_names(match)
            if name.startswith("A")
        }
        return Pending(
            plan=plan,
            weight=weight,
            gradients=dict(gradients),
            statistics=dict(statistics),
            rows=rows,
            finite=finite,
        )

    def joined(self, other: Pending) -> Pending:
        """Both as one: a mean loss averages, weighted by its terms; a sum loss adds up."""
        summed = _adds_up(other)
        share = other.weight / (self.weight + other.weight)
        statistics = {
            key: _joined_statistic(key, self, other, share, summed)
            for key in {**self.statistics, **other.statistics}
        }
        gradients = {
            name: _joined_gradient(self.gradients.get(name), other.gradients.get(name), share, summed)
            for name in {**self.gradients, **other.gradients}
        }
        return Pending(
            plan=max(self.plan, other.plan, key=lambda plan: len(plan.matched)),
            weight=self.weight + other.weight,
            gradients=gradients,
            statistics=statistics,
            rows={
                key: _added(self.rows.get(key, 0), other.rows.get(key, 0)) for key in self.rows | other.rows
            },
            finite=_both(self.finite, other.finite),
        )


def _both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first & second


def _num_rows(plan: Plan, match: LayerMatch, name: str) -> int | None:
    num = plan.method.mean_over(match, name)
    positions = num > match.examples * len(match.uses)
    ignored = plan.capture.loss_info.ignores and match.structure == "kronecker" and positions
    return None if ignored else num


def _added(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first + second


def _adds_up(batch: Pending) -> Tensor | None:
    """Whether the loss of two batches is the sum of both, not their mean: 0-dim bool; None: certainly not."""
    info = batch.plan.capture.loss_info
    if info.reduction not in ("sum", "none"):
        return None
    return (batch.weight.double() / info.unit - 1).abs() < 1e-5


def _joined_statistic(
    key: Key, first: Pending, second: Pending, share: Tensor, summed: Tensor | None
) -> Tensor:
    """Statistics of the input are means over rows; others follow the loss."""
    old, new = first.statistics.get(key), second.statistics.get(key)
    if old is None or new is None:
        return old if new is None else new  # type: ignore[return-value]
    share = share.to(old.dtype)
    weights = 1 - share, share
    before, after = first.rows.get(key), second.rows.get(key)
    if before is not None and after is not None:
        rows = after / (before + after)
        weights = torch.full_like(share, 1 - rows), torch.full_like(share, rows)
    elif key not in second.rows and summed is not None:
        weights = weights[0].masked_fill(summed, 1.0), weights[1].masked_fill(summed, 1.0)
    return first.plan.method.join(key[1], old, new, weights)


def _joined_gradient(old: Tensor | None, new: Tensor | None, share: Tensor, summed: Tensor | None) -> Tensor:
    """A parameter that one of the batches does not reach has gradient zero there."""
    present = new if new is not None else old
    assert present is not None
    old = torch.zeros_like(present) if old is None else old
    new = torch.zeros_like(present) if new is None else new
    share = share.to(old.dtype)
    if summed is None:
        return torch.lerp(old, new, share)
    return old * (1 - share).masked_fill(summed, 1.0) + new * share.masked_fill(summed, 1.0)
