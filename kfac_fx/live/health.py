"""Condition, effective rank and inverse residual of one factor, in float64; and the records of a layer.

Enters: a `View`. Leaves: a `FactorHealth`. Eigenvalues cost d^3: factors beyond a size are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from kfac_fx.live.views import View


@final
@dataclass(frozen=True, kw_only=True)
class FactorHealth:
    """One factor; of several of one layer (groups, experts) the figures of the worst-conditioned one.

    dim: side length. count: how many such factors. largest, smallest: eigenvalues. damping: what is added to
    them now. condition: of the factor; infinite where it is singular up to rounding. damped_condition: with
    damping. effective_rank: exp of the entropy of the eigenvalues over their sum, 1 to dim (Roy & Vetterli
    2007, EUSIPCO). residual: |inverse (factor + damping I) - I|_F / sqrt(dim) of the stored inverse against
    the present factor and damping, the largest of all groups; it grows between refreshes as the factor moves.
    eigenvalues: ascending, float64, on the CPU.

    None: not known for this method, or the factor was left out.
    """

    side: str
    dim: int
    count: int
    largest: float | None = None
    smallest: float | None = None
    damping: float | None = None
    condition: float | None = None
    damped_condition: float | None = None
    effective_rank: float | None = None
    residual: float | None = None
    eigenvalues: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def severity(self) -> float:
        """By what the worst is found: the condition of what is inverted, else of the factor; 0: not known."""
        return _order(self.condition if self.damped_condition is None else self.damped_condition)


@final
@dataclass(frozen=True, kw_only=True)
class LayerHealth:
    """One layer. name: module path, or name of the weight. group: with the layers that are alike.

    statistics, refreshes: how often so far. since_refresh: steps since the last one; None before the first
    in this process. state_bytes: without tensors that it shares with an earlier layer.
    """

    name: str
    key: str
    group: str
    statistics: int
    refreshes: int
    since_refresh: int | None
    state_bytes: int
    factors: tuple[FactorHealth, ...]

    @property
    def severity(self) -> float:
        """That of its worst factor; of those that are damped, if any is."""
        damped = [factor for factor in self.factors if factor.damped_condition is not None]
        return max((factor.severity for factor in damped or self.factors), default=0.0)


def factor_health(view: View, *, max_dim: int, known: dict[int, tuple[View, Tensor]]) -> FactorHealth:
    """Figures of one factor. known: eigenvalues by the identity of a tensor that several layers read."""
    dim, count = _size(view)
    if not _within(view, max_dim):
        return FactorHealth(side=view.side, dim=dim, count=count)
    if id(view.tensor) not in known:
        known[id(view.tensor)] = view, eigenvalues(view)
    values = known[id(view.tensor)][1]
    added = _added(view, values)
    threshold = dim * torch.finfo(view.tensor.dtype).eps
    conditions = [_condition(row, threshold=threshold) for row in values]
    damped = [_condition(row, threshold=threshold) for row in values + added]
    pair = zip(damped, conditions, strict=True)
    worst = max(enumerate(pair), key=lambda item: [_order(condition) for condition in item[1]])[0]
    # What a root stands for has its damping inside.
    return FactorHealth(
        side=view.side,
        dim=dim,
        count=count,
        largest=float(values[worst].amax()),
        smallest=float(values[worst].amin()),
        damping=None if view.damping is None else float(added[worst].mean()),
        condition=None if view.form == "root" else conditions[worst],
        damped_condition=None if view.damping is None and view.form != "root" else damped[worst],
        effective_rank=effective_rank(values[worst]),
        residual=inverse_residual(view),
        eigenvalues=values[worst].sort().values,
    )


def eigenvalues(view: View) -> Tensor:
    """[groups, d], or [1, n] of a block-diagonal or diagonal matrix, on the CPU; NaN if it is not finite."""
    tensor = view.tensor.detach().double()
    if not bool(torch.isfinite(tensor).all()):
        return torch.full((1, _size(view)[0]), math.nan, dtype=torch.float64)
    if view.form == "diagonal":
        return tensor.reshape(1, -1).cpu()
    if view.form == "blocks":
        return torch.linalg.eigvalsh(tensor).reshape(1, -1).cpu()
    if view.form == "root":
        singular = tensor[None] if tensor.dim() == 1 else torch.linalg.svdvals(tensor)
        return singular.pow(-2).cpu()
    if view.form == "rows":
        return _of_rows(tensor).cpu()
    return torch.linalg.eigvalsh(tensor).cpu()


def effective_rank(values: Tensor) -> float:
    """Exp of the Shannon entropy of the eigenvalues over their sum; 0 for a zero factor. values: [d].

    Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality" (EUSIPCO).
    """
    values = values.clamp(min=0)
    total = values.sum()
    if not bool(total > 0):
        return math.nan if bool(torch.isnan(total)) else 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())


def inverse_residual(view: View) -> float | None:
    """|inverse (factor + damping I) - I|_F / sqrt(d), the largest of all groups; None without an inverse."""
    if view.inverse is None or view.damping is None:
        return None
    factor, inverse, added = view.tensor.double(), view.inverse.double(), view.damping.double()
    if view.form == "diagonal":
        error = inverse * (factor + added.reshape(-1)) - 1
        return float(torch.linalg.vector_norm(error) / error.numel() ** 0.5)
    if view.form == "rows":
        factor = factor.mT @ factor
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    error = inverse @ (factor + added.expand(factor.shape[0])[:, None, None] * eye) - eye
    norms = torch.linalg.vector_norm(error, dim=(1, 2))
    if view.form == "blocks":
        return float(torch.linalg.vector_norm(norms) / (norms.numel() * factor.shape[-1]) ** 0.5)
    return float(norms.amax() / factor.shape[-1] ** 0.5)


def _size(view: View) -> tuple[int, int]:
    """(side length, how many)."""
    tensor = view.tensor
    if view.form in ("diagonal", "blocks") or tensor.dim() == 1:
        return tensor.shape[:2].numel() if view.form == "blocks" else tensor.numel(), 1
    return tensor.shape[-1], tensor.shape[0]


def _within(view: View, max_dim: int) -> bool:
    """Whether its eigenvalues may be computed."""
    dense = view.form in ("dense", "rows", "root") and view.tensor.dim() > 1
    return not dense or view.tensor.shape[-1] <= max_dim


def _of_rows(rows: Tensor) -> Tensor:
    """Of X^T X, from the smaller of both products; the rest is zero."""
    num, dim = rows.shape[1:]
    small = torch.linalg.eigvalsh(rows.mT @ rows if num >= dim else rows @ rows.mT)
    return torch.nn.functional.pad(small, (max(dim - num, 0), 0))


def _added(view: View, values: Tensor) -> Tensor:
    """The damping of each eigenvalue, shaped to broadcast with them."""
    if view.damping is None:
        return torch.zeros(len(values), 1, dtype=values.dtype)
    damping = view.damping.detach().double().cpu()
    if view.form == "blocks":
        size = view.tensor.shape[-1]
        return damping.expand(view.tensor.shape[0]).repeat_interleave(size)[None]
    return damping.reshape(-1, 1).expand(len(values), 1)


def _condition(values: Tensor, *, threshold: float) -> float:
    """Largest over smallest; infinite if the smallest is zero up to rounding."""
    largest, smallest = float(values.amax()), float(values.amin())
    if math.isnan(largest):
        return math.nan
    return largest / smallest if smallest > threshold * largest else math.inf


def _order(condition: float | None) -> float:
    return 0.0 if condition is None else math.inf if math.isnan(condition) else condition
