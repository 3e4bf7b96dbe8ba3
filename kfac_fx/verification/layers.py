"""Checks of one layer: its gradient, its statistics, its direction.

Enters: explicit rows and what the library computed. Leaves: a `LayerVerdict`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from kfac_fx.canonical import state_owner
from kfac_fx.methods import NKFAC
from kfac_fx.types import LayerMatch, State
from kfac_fx.verification import graph_rows
from kfac_fx.verification.eager import Observed, Plain
from kfac_fx.verification.graph_rows import Values
from kfac_fx.verification.module_rows import rows_at_modules
from kfac_fx.verification.moments import Moments, expected_blocks, expected_statistic, sharing_of
from kfac_fx.verification.ours import Ours, Outputs
from kfac_fx.verification.records import Check, LayerVerdict
from kfac_fx.verification.rows import BlockRows, UseRows, block_gradient, gradient, rounded_to_bfloat16
from kfac_fx.verification.solves import expected_direction
from kfac_fx.verification.tolerance import Tolerance, compared, distance, joined

Rows = Sequence[UseRows] | Sequence[BlockRows]


@final
@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything that verdicts are made of. values: of graph nodes. observed: None where modules do not show
    the passes of the Fisher. factors: explicit statistics by layer as far as verdicts are made, or a reason.
    """

    plain: Plain
    observed: Observed | None
    ours: Ours
    values: Values
    tolerance: Tolerance
    factors: dict[str, dict[str, Tensor] | str] = field(default_factory=dict)


def verdict(match: LayerMatch, evidence: Evidence) -> LayerVerdict:
    """Gradient, statistics and direction of one layer; `update` is added by the caller."""
    from_graph = rows_in_graph(match, evidence.values)
    rounds = evidence.ours.plan.rounds_rows  # rows that differ in their last bit can round apart
    at_modules = None if rounds else _module_rows(match, evidence)
    rows = from_graph if at_modules is None else at_modules
    statistics, factors = _statistics(match, rows, evidence)
    evidence.factors[match.key] = factors
    checks = (
        _gradient_check(match, from_graph, evidence),
        statistics,
        _direction_check(match, factors, evidence),
    )
    return LayerVerdict(layer=match, rows="graph" if at_modules is None else "module", checks=checks)


def rows_in_graph(match: LayerMatch, values: Values) -> Rows:
    """Rows from the nodes that the match names."""
    if match.structure == "block":
        return graph_rows.block_rows(match, values)
    return graph_rows.kronecker_rows(match, values)


def _module_rows(match: LayerMatch, evidence: Evidence) -> Rows | None:
    """Rows at the modules, if these are all uses of the layer: their sum is the gradient."""
    observed, info = evidence.observed, evidence.ours.plan.capture.loss_info
    if observed is None or (info.ignores and len(match.uses) > 1):
        return None
    rows = rows_at_modules(match, observed.calls.get(match.weight, []), examples=info.examples)
    if rows is None or _gradient_check(match, rows, evidence).status != "ok":
        return None
    return rows


def canonical_gradient(match: LayerMatch, gradients: Mapping[str, Tensor]) -> Tensor:
    """Autograd's gradient as [groups, d_out, d_in(+1)], or [channels, k]."""
    part = slice(None) if match.part is None else slice(*match.part)
    weight = match.layout.to_matrix(gradients[match.weight][part])
    weight = weight.unsqueeze(-1) if match.structure == "block" else weight
    if match.bias is None:
        return weight
    assert match.bias_layout is not None
    return torch.cat([weight, match.bias_layout.to_matrix(gradients[match.bias][part]).unsqueeze(-1)], -1)


def _gradient_check(match: LayerMatch, rows: Rows, evidence: Evidence) -> Check:
    """Sum of g a^T over all uses is the gradient of eager PyTorch."""
    bias = match.bias is not None
    if match.structure == "block":
        found, size = block_gradient([r for r in rows if isinstance(r, BlockRows)], bias=bias)
    else:
        found, size = gradient([r for r in rows if isinstance(r, UseRows)], bias=bias)
    expected = canonical_gradient(match, evidence.plain.gradients)
    error = distance(found, expected, size=size.max())
    return Check(name="gradient", error=error, tolerance=evidence.tolerance.product)


def explicit_statistics(
    match: LayerMatch,
    rows: Rows,
    evidence: Evidence,
    *,
    scale: float,
    state: State,
    only: tuple[str, ...] | None = None,
) -> dict[str, Tensor | str]:
    """Statistics of one batch by name, or why one is not known. scale: 1/R_. state: before the batch."""
    method = evidence.ours.plan.method
    names = method.statistics_names(match) if only is None else only
    moments = _moments(match, rows, evidence, scale)
    if isinstance(moments, Moments):
        return {name: expected_statistic(method, name, moments, state) for name in names}
    bias = match.bias is not None
    return {name: expected_blocks(method, moments, bias=bias, inverse_scale=scale) for name in names}


def _statistics(match: LayerMatch, rows: Rows, evidence: Evidence) -> tuple[Check, dict[str, Tensor] | str]:
    """The check of all statistics, and the explicit ones by name, or why they are not known."""
    ours, checks = evidence.ours, []
    method, scale = ours.plan.method, float(ours.statistics.inverse_scale)
    factors: dict[str, Tensor] = {}
    why = ""
    found = explicit_statistics(match, rows, evidence, scale=scale, state=ours.before[match.key])
    for name, expected in found.items():
        if isinstance(expected, str):
            why = expected
            checks.append(Check(name=name, reason=expected))
            continue
        factors[name.replace("_rows", "")] = expected
        checks.append(_statistic_check(match, name, ours.statistics, expected, evidence))
    if "S" in found and ours.later is not None:
        after = ours.after[match.key]
        again = explicit_statistics(match, rows, evidence, scale=scale, state=after, only=("S",))["S"]
        assert isinstance(again, Tensor)
        checks.append(_statistic_check(match, "S", ours.later, again, evidence))
    if not checks:
        return Check(name="statistics", reason=f"{method.name} keeps none for this layer"), "no statistics"
    return joined("statistics", checks), why or factors


def _statistic_check(
    match: LayerMatch, name: str, outputs: Outputs, expected: Tensor, evidence: Evidence
) -> Check:
    found = outputs.statistics[state_owner(evidence.ours.plan, match, name), name]
    if name.endswith("_rows"):
        found = found.double().mT @ found.double()
    return compared(name, found, expected, tolerance=evidence.tolerance.product)


def _moments(match: LayerMatch, rows: Rows, evidence: Evidence, scale: float) -> Moments | list[BlockRows]:
    if match.structure == "block":
        return [r for r in rows if isinstance(r, BlockRows)]
    uses = [r for r in rows if isinstance(r, UseRows)]
    if evidence.ours.plan.rounds_rows:
        uses = [rounded_to_bfloat16(use) for use in uses]
    sharing = sharing_of(evidence.ours.plan.method, match)
    kept = [_kept(match, place, evidence) if sharing == "expand" else None for place in range(len(uses))]
    return Moments(match=match, uses=uses, inverse_scale=scale, sharing=sharing, kept=kept)


def _kept(match: LayerMatch, place: int, evidence: Evidence) -> Tensor | None:
    """Rows with a gradient in some layer that reads this input, where the loss ignores terms: [N, T]."""
    plan = evidence.ours.plan
    if not plan.capture.loss_info.ignores:
        return None
    alike = [other for other in plan.matched if other.shared_a == match.shared_a]
    seen = []
    for other in alike if match.structure == "kronecker" else [match]:
        use = rows_in_graph(other, evidence.values)[place]
        assert isinstance(use, UseRows)
        seen += [g.abs().amax((0, 3)) for g in use.fisher]
    return None if seen[0].shape[1] == 1 else torch.stack(seen).amax(0) != 0


def _direction_check(match: LayerMatch, factors: dict[str, Tensor] | str, evidence: Evidence) -> Check:
    """The direction after the first refresh is that of dense algebra."""
    method = evidence.ours.plan.method
    if isinstance(factors, str):
        return Check(name="direction", reason=factors)
    if isinstance(method, NKFAC):  # its G is the plain sum over gradients as they are
        scale = float(evidence.ours.statistics.inverse_scale)
        factors = {name: f / scale if name.startswith("G") else f for name, f in factors.items()}
    expected = expected_direction(method, match, factors, canonical_gradient(match, evidence.plain.gradients))
    if isinstance(expected, str):
        return Check(name="direction", reason=expected)
    found = evidence.ours.directions[match.key]
    return compared("direction", found, expected, tolerance=evidence.tolerance.solve)
