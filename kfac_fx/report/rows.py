"""From a `Plan` to the rows and totals that every report shows.

Enters: a plan. Leaves: records of plain numbers and strings, so that text, terminal and JSON agree. Layers
that differ only in one integer of their path share a row; what a layer borrows counts at its owner.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

from kfac_fx.contracts import Plan
from kfac_fx.errors import Reason
from kfac_fx.types import FactorSpec, LayerMatch, Skip, Source


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
    """One layer, or several that are alike. `cost` is the cost of ONE of them."""

    label: str
    members: tuple[LayerMatch, ...]
    factors: tuple[FactorSpec, ...]
    cost: Cost

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
class SkipRow:
    """Skipped parameters of one reason whose names and details differ only in numbers."""

    label: str
    detail: str
    members: tuple[Skip, ...]
    sources: str


@final
@dataclass(frozen=True, kw_only=True)
class Totals:
    """Figures of a whole plan: parameters by element, tensors by name, frozen ones apart."""

    layers: int
    nodes: int
    trainable: int
    matched: int
    skipped: int
    skipped_tensors: int
    frozen_tensors: int
    cost: Cost
    model_flops: int
    statistics_every: int
    inverse_every: int

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


def cost_of(factors: Iterable[FactorSpec]) -> Cost:
    """Sum over factors. A layer that borrows A counts what it owns: the inverse, if that is not shared."""
    everything = tuple(factors)
    return Cost(
        state_bytes=sum(f.bytes for f in everything),
        statistics=sum(f.flops_statistics for f in everything),
        inversion=sum(f.flops_refresh for f in everything),
        apply=sum(f.flops_apply for f in everything),
    )


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


def layer_rows(plan: Plan, layers: Sequence[LayerMatch], *, collapse: bool) -> list[LayerRow]:
    """Rows of these layers, in their order. collapse: one row for layers that are alike."""
    labels = layer_labels(plan)
    owned: dict[str, list[FactorSpec]] = {}
    for factor in plan.factors:
        owned.setdefault(factor.owner, []).append(factor)
    groups: list[list[LayerMatch]] = []
    by_shape: dict[object, list[list[LayerMatch]]] = {}
    for match in layers:
        alike = by_shape.setdefault(_fingerprint(match, owned.get(match.key, [])), [])
        label = labels[match.key]
        home = next((g for g in alike if collapse and _joins([labels[m.key] for m in g], label)), None)
        if home is None:
            home = []
            alike.append(home)
            groups.append(home)
        home.append(match)
    return [_layer_row(group, labels, owned) for group in groups]


def skip_rows(skips: Iterable[Skip]) -> dict[Reason, list[SkipRow]]:
    """Skipped parameters by reason, in order of appearance."""
    groups: dict[tuple[Reason, str, str], list[Skip]] = {}
    for skip in skips:
        groups.setdefault((skip.reason, _digitless(skip.parameter), _digitless(skip.detail)), []).append(skip)
    rows: dict[Reason, list[SkipRow]] = {}
    for (reason, _, _), members in groups.items():
        row = SkipRow(
            label=_wildcards([s.parameter for s in members]),
            detail=_wildcards([s.detail for s in members]),
            members=tuple(members),
            sources=_sources([s.source for s in members if s.source]),
        )
        rows.setdefault(reason, []).append(row)
    return rows


def totals(plan: Plan) -> Totals:
    """Figures of the whole plan."""
    active = [s for s in plan.skipped if s.reason is not Reason.FROZEN]
    return Totals(
        layers=len(plan.matched),
        nodes=len(plan.capture.graph.graph.nodes),
        trainable=sum(p.numel for p in plan.capture.parameters if p.trainable),
        matched=sum(m.numel for m in plan.matched),
        skipped=sum(s.numel for s in active),
        skipped_tensors=len(active),
        frozen_tensors=len(plan.skipped) - len(active),
        cost=cost_of(plan.factors),
        model_flops=plan.model_flops,
        statistics_every=plan.method.statistics_every,
        inverse_every=plan.method.inverse_every,
    )


def _layer_row(
    group: Sequence[LayerMatch], labels: dict[str, str], owned: dict[str, list[FactorSpec]]
) -> LayerRow:
    factors = tuple(owned.get(group[0].key, ()))
    return LayerRow(
        label=_ranges([labels[m.key] for m in group]),
        members=tuple(group),
        factors=factors,
        cost=cost_of(factors),
    )


def _fingerprint(match: LayerMatch, factors: Sequence[FactorSpec]) -> object:
    """Two layers may share a row only if these facts agree."""
    source = (match.source.file, match.source.line) if match.source else None
    shape = (match.kind, match.structure, match.bias is None, match.groups, match.d_in, match.d_out)
    costs = tuple((f.side, f.dim, f.count, f.diagonal, f.form, cost_of([f])) for f in factors)
    return (source, shape, match.numel, match.rows, len(match.uses), costs)


def _joins(labels: Sequence[str], candidate: str) -> bool:
    """Whether the labels and the candidate differ in exactly one path component, always an integer."""
    columns = list(zip(*(label.split(".") for label in (*labels, candidate)), strict=False))
    if len({label.count(".") for label in (*labels, candidate)}) != 1:
        return False
    varying = [column for column in columns if len(set(column)) > 1]
    return len(varying) == 1 and all(part.isdecimal() for part in varying[0])


def _ranges(labels: Sequence[str]) -> str:
    """`blocks.0.qkv`, `blocks.1.qkv`, `blocks.3.qkv` -> `blocks.[0-1,3].qkv`."""
    columns = zip(*(label.split(".") for label in labels), strict=True)
    return ".".join(column[0] if len(set(column)) == 1 else f"[{_spans(column)}]" for column in columns)


def _spans(numbers: Iterable[str]) -> str:
    """`0`, `1`, `2`, `5` -> `0-2,5`."""
    spans: list[list[int]] = []
    for number in sorted({int(text) for text in numbers}):
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ",".join("-".join(map(str, span)) for span in spans)


def _digitless(text: str) -> str:
    return re.sub(r"\d+", "*", text)


def _wildcards(texts: Sequence[str]) -> str:
    """Texts that differ only in numbers as one pattern: the numbers that vary become `*`."""
    columns = zip(*(re.split(r"(\d+)", text) for text in texts), strict=True)
    return "".join(column[0] if len(set(column)) == 1 else "*" for column in columns)


def _sources(sources: Sequence[Source]) -> str:
    """`models.py:13,16`: at most three lines of each file."""
    lines: dict[str, list[int]] = {}
    for source in sources:
        known = lines.setdefault(str(source).rsplit(":", 1)[0], [])
        if source.line not in known:
            known.append(source.line)
    shown = (f"{name}:{','.join(map(str, n[:3]))}{',..' if len(n) > 3 else ''}" for name, n in lines.items())
    return " ".join(shown)
