"""What the page's script reads: rows, layers, drawings and programs as one JSON value.

Enters: a plan and its statistics step. Leaves: dicts, lists, strings and numbers. Costs are those of the
report.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from kfac_fx import graph as fxgraph
from kfac_fx.export.page_boxes import LANES, Neighbourhood
from kfac_fx.export.page_code import Span, hunks, merged, node_lines
from kfac_fx.export.page_graph import Surveyor
from kfac_fx.export.strip import per_step
from kfac_fx.export.subject import PassProgram, StatisticsStep
from kfac_fx.planned import Plan
from kfac_fx.report.document import document
from kfac_fx.report.rows import forward_order, layer_labels, layer_rows, totals
from kfac_fx.report.skips import skip_rows
from kfac_fx.stages import PASSES
from kfac_fx.types import LayerMatch

_KINDS = ("key", "ops", "near")


def page_data(plan: Plan, step: StatisticsStep) -> dict[str, Any]:
    """Everything the script needs."""
    lines = step.texts[-1].text.splitlines()
    content, matches = document(plan), forward_order(plan)
    surveyor, where = Surveyor(plan, step.program), node_lines(lines)
    labels, sums, grouped = layer_labels(plan), totals(plan), layer_rows(plan, matches, collapse=True)
    alone = {row.first.key: row for row in layer_rows(plan, matches, collapse=False)}
    for layer, match in zip(content["layers"], matches, strict=True):
        layer["label"] = labels[match.key]
        layer["shapes"] = _shapes(plan, match)
        layer["per_step"] = per_step(alone[match.key].total, sums)
    for shown, row in zip(content["rows"], grouped, strict=True):
        shown["per_step"] = per_step(row.total, sums)
    return {
        "report": content,
        "skips": _skips(plan),
        "lanes": LANES,
        "graphs": [_graph(surveyor.around(match), where, lines) for match in matches],
        "programs": _programs(step.texts),
    }


def _shapes(plan: Plan, match: LayerMatch) -> dict[str, list[list[int]]]:
    """Shapes of the parameter, and of a and g of each use."""
    shapes = {
        "weight": [list(plan.capture.parameter(match.weight).shape)],
        "a": [list(fxgraph.shape(use.a)) for use in match.uses if use.a is not None],
        "g": [list(fxgraph.shape(use.g[0])) for use in match.uses],
    }
    return shapes


def _skips(plan: Plan) -> list[dict[str, Any]]:
    """Skipped parameters by reason, those alike together."""
    return [
        {
            "reason": reason.value,
            "advice": reason.advice,
            "label": row.label,
            "detail": row.detail,
            "sources": row.sources,
            "numel": sum(member.numel for member in row.members),
            "members": [member.parameter for member in row.members],
        }
        for reason, rows in skip_rows(plan.skipped).items()
        for row in rows
    ]


def _graph(around: Neighbourhood, where: dict[str, Span], lines: Sequence[str]) -> list[Any]:
    """Boxes as [title, note, lane, kind, first line, last line, ...], arrows, arrows through hidden nodes."""
    boxes = [
        [box.title, box.note, box.lane, _KINDS.index(box.kind), *_flat(box.nodes, where, lines)]
        for box in around.boxes
    ]
    return [boxes, around.arrows, around.through]


def _flat(nodes: Sequence[Node], where: dict[str, Span], lines: Sequence[str]) -> list[int]:
    spans = merged([where[node.name] for node in nodes if node.name in where], lines)
    return [number for span in spans for number in span]


def _programs(programs: Sequence[PassProgram]) -> list[dict[str, Any]]:
    """The first text whole, of each other what it changes in the one before."""
    found, before = [], []
    for stage in programs:
        lines = stage.text.splitlines()
        changes = hunks(before, lines)
        new = [line for _, _, start, end in changes for line in lines[start:end]]
        flat = [number for hunk in changes for number in hunk]
        found.append({"name": stage.name, "about": PASSES[stage.name], "hunks": flat, "new": "\n".join(new)})
        before = lines
    return found
