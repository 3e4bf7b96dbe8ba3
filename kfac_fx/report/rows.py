"""From a `Plan` to the rows and totals that every report shows.

Enters: a plan. Leaves: records of plain numbers and strings, so that text, terminal and JSON agree. Layers
that differ only in integers of their path share a row, and so do norms whose widths differ; what a layer
borrows counts at its owner.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import final

from kfac_fx.errors import Reason
from kfac_fx.forms import words
from kfac_fx.planned import Plan
from kfac_fx.report.collapse import collapsed, spanned, template
from kfac_fx.stages import runs
from kfac_fx.types import FactorSpec, LayerMatch


@final
@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one layer, or a whole plan, stores (bytes) and computes each time a phase runs (FLOPs)."""

    state_bytes: int
    statistics: int
    inversion: int
    apply: int


@final
@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One layer, or several that are alike: only norms may differ in width.

    factors: of each member. cost: of the first member; total: of all.
    """

    label: str
    members: tuple[LayerMatch, ...]
    factors: tuple[tuple[FactorSpec, ...], ...]
    cost: Cost
    total: Cost

    @property
    def first(self) -> LayerMatch:
        """The member that stands for all."""
        return self.members[0]

    @property
    def count(self) -> int:
        """Number of layers in this row."""
        return len(self.members)


@final
@dataclass(frozen=True, kw_only=True)
class Totals:
    """Figures of a whole plan: parameters by element, tensors by name, frozen ones apart.

    fisher_flops: of the backward passes for the Fisher alone, a part of the cost of statistics.
    off: phases that never run, since their pass is switched off; they cost nothing.
    """

    layers: int
    nodes: int
    trainable: int
    matched: int
    skipped: int
    skipped_tensors: int
    frozen_tensors: int
    cost: Cost
    model_flops: int
    fisher_flops: int
    parameter_bytes: int
    statistics_every: int
    inverse_every: int
    off: frozenset[str] = frozenset()

    def overhead(self, phase: str) -> float | None:
        """Extra work per step over the model's own, on average. None: the model has no FLOPs."""
        if not self.model_flops:
            return None
        parts = {
            "apply": self.cost.apply,
            "statistics": self.cost.statistics / self.statistics_every,
            "inversion": self.cost.inversion / self.inverse_every if self.inverse_every else 0.0,
        }
        return (sum(parts.values()) if phase == "total" else parts[phase]) / self.model_flops


def settings(plan: Plan) -> list[tuple[str, str]]:
    """Name and value of what was chosen, for the head of a report. The last two only where they are."""
    found = [("method", plan.method.name), ("sharing", plan.sharing), ("fisher", plan.fisher)]
    if plan.rounds_rows:
        found.append(("statistics of", "bfloat16 rows"))
    if plan.without:
        found.append(("without", ", ".join(sorted(plan.without))))
    return found


def cost_of(factors: Iterable[FactorSpec], *, off: frozenset[str] = frozenset()) -> Cost:
    """Sum over factors. A layer that borrows A counts what it owns: the inverse, if that is not shared.

    off: as of `phases_off`.
    """
    everything = tuple(factors)
    return Cost(
        state_bytes=sum(f.bytes for f in everything),
        statistics=0 if "statistics" in off else sum(f.flops_statistics for f in everything),
        inversion=0 if "inversion" in off else sum(f.flops_refresh for f in everything),
        apply=0 if "apply" in off else sum(f.flops_apply for f in everything),
    )


def phases_off(plan: Plan) -> frozenset[str]:
    """Phases without work as their pass is off. Statistics that no average takes in are no longer computed,
    and what has no statistics has no refresh.
    """
    collects, applies = runs("averages", plan.without), runs("precondition", plan.without)
    return frozenset((() if collects else ("statistics", "inversion")) + (() if applies else ("apply",)))


def forward_order(plan: Plan) -> tuple[LayerMatch, ...]:
    """Matched layers in the order in which the forward pass first reads their weights."""
    graph = plan.capture.graph.graph
    place = {node: index for index, node in enumerate(graph.nodes)}
    nodes = {parameter.name: parameter.node for parameter in plan.capture.parameters}

    def first_use(match: LayerMatch) -> int:
        return min((place[user] for user in nodes[match.weight].users), default=len(place))

    return tuple(sorted(plan.matched, key=first_use))


def layer_labels(plan: Plan) -> dict[str, str]:
    """What to call each layer, by key: its module path, or its key where that is empty or not unique."""
    names = [match.name for match in plan.matched]
    return {m.key: m.name if m.name and names.count(m.name) == 1 else m.key for m in plan.matched}


def fits(match: LayerMatch, labels: Mapping[str, str], pattern: str) -> bool:
    """Whether the layer's label, path, weight or key fits an fnmatch pattern. labels: of `layer_labels`."""
    return any(fnmatchcase(n, pattern) for n in (labels[match.key], match.name, match.weight, match.key))


def layer_rows(plan: Plan, layers: Sequence[LayerMatch], *, collapse: bool) -> list[LayerRow]:
    """Rows of these layers, in their order. collapse: one row for layers that are alike."""
    labels, owned, off = layer_labels(plan), factors_by_layer(plan), phases_off(plan)
    groups: dict[Hashable, list[LayerMatch]] = {}
    for match in layers:
        groups.setdefault(_likeness(match, owned[match.key]) if collapse else match.key, []).append(match)
    rows: list[LayerRow] = []
    for group in groups.values():
        names = [labels[match.key] for match in group]
        parts = collapsed(names)
        if len(parts) > 1 and group[0].structure == "block":
            parts = [(spanned([names[i] for i in places]), places) for places in _by_template(names)]
        rows += [_layer_row(label, [group[i] for i in places], owned, off) for label, places in parts]
    position = {match.key: index for index, match in enumerate(layers)}
    return sorted(rows, key=lambda row: position[row.first.key])


def factors_by_layer(plan: Plan) -> dict[str, tuple[FactorSpec, ...]]:
    """Factors of each matched layer, by its key."""
    found: dict[str, list[FactorSpec]] = {match.key: [] for match in plan.matched}
    for factor in plan.factors:
        found[factor.owner].append(factor)
    return {key: tuple(factors) for key, factors in found.items()}


def gram_form(match: LayerMatch, factor: FactorSpec) -> str:
    """Short name of how a convolution's A is computed, as in `kfac_fx.forms`; "" if there is no choice."""
    use = match.uses[0]
    if factor.side != "A" or use.geometry is None:
        return ""
    form = use.options["form"]
    return form if factor.form.endswith(words(form, use.geometry)) else "other"


def estimated_ns(match: LayerMatch, factor: FactorSpec) -> int | None:
    """Estimated nanoseconds of a convolution's A by `kfac_fx.forms`, all uses; None if it has no choice."""
    if gram_form(match, factor) in ("", "other"):
        return None
    return sum(use.options["estimated_ns"] for use in match.uses)


def totals(plan: Plan) -> Totals:
    """Figures of the whole plan."""
    active, off = [s for s in plan.skipped if s.reason is not Reason.FROZEN], phases_off(plan)
    cost, fisher_flops = cost_of(plan.factors, off=off), 0 if "statistics" in off else plan.fisher_flops
    return Totals(
        layers=len(plan.matched),
        nodes=len(plan.capture.graph.graph.nodes),
        trainable=sum(p.numel for p in plan.capture.parameters if p.trainable),
        matched=sum(m.numel for m in plan.matched),
        skipped=sum(s.numel for s in active),
        skipped_tensors=len(active),
        frozen_tensors=len(plan.skipped) - len(active),
        cost=replace(cost, statistics=cost.statistics + fisher_flops),
        model_flops=plan.model_flops,
        fisher_flops=fisher_flops,
        parameter_bytes=sum(p.numel * p.dtype.itemsize for p in plan.capture.parameters),
        statistics_every=plan.method.statistics_every,
        inverse_every=plan.method.inverse_every,
        off=off,
    )


def _layer_row(
    label: str,
    group: Sequence[LayerMatch],
    owned: Mapping[str, tuple[FactorSpec, ...]],
    off: frozenset[str],
) -> LayerRow:
    factors = tuple(owned[match.key] for match in group)
    return LayerRow(
        label=label,
        members=tuple(group),
        factors=factors,
        cost=cost_of(factors[0], off=off),
        total=cost_of((factor for of_one in factors for factor in of_one), off=off),
    )


def _likeness(match: LayerMatch, factors: Sequence[FactorSpec]) -> Hashable:
    """Two layers may share a row only if these facts agree; of blocks (norms) the width may differ."""
    source = (match.source.file, match.source.line) if match.source else None
    facts = (source, match.kind, match.structure, match.bias is None, len(match.uses))
    if match.structure == "block":
        return facts
    shape = (match.groups, match.d_in, match.d_out, match.numel, match.rows)
    costs = tuple(
        (f.side, f.dim, f.count, f.diagonal, f.form, bool(f.shared_with), cost_of([f])) for f in factors
    )
    return (facts, shape, costs)


def _by_template(names: Sequence[str]) -> list[list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(template(name), []).append(index)
    return list(groups.values())
