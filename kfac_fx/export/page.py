"""`index.html`: one file that a person opens, without network, and the strip as a file of its own.

Enters: a subject. Leaves: text. Everything the page shows is in it: the style, the script, and one JSON value
that is deflated where it is long.
"""

from __future__ import annotations

import base64
import importlib.resources
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from kfac_fx.errors import Reason
from kfac_fx.export.page_data import page_data
from kfac_fx.export.strip import strip
from kfac_fx.export.subject import Subject
from kfac_fx.planned import Plan
from kfac_fx.report.numbers import bytes_text, flops_text, part_text, share_text, tensors_text
from kfac_fx.report.rows import Totals, settings, totals
from kfac_fx.report.skips import SkipRow, skip_rows
from kfac_fx.wording import counted

PLAIN_LIMIT = 400_000
_SCRIPTS = ("start.js", "strip.js", "table.js", "layer.js", "graph.js", "code.js", "page.js")
_SLOT = re.compile(r"\{\{(\w+)\}\}")


def pages(subject: Subject) -> dict[str, str]:
    """`index.html` and `strip.svg`."""
    drawing = strip(subject.plan, page="index.html")
    data = page_data(subject.plan, subject.step)
    return {"index.html": page(subject.plan, data), "strip.svg": drawing + "\n"}


def page(plan: Plan, data: Mapping[str, Any]) -> str:
    """The page as one text. data: of `page_data`."""
    content = {**data, "graphs": [_relative(graph) for graph in data["graphs"]]}
    encoding, stored = encoded(json.dumps(content, separators=(",", ":")))
    name = plan.capture.model_name
    return _filled(
        _asset("page.html"),
        {
            "title": escape(f"{name} - kfac-fx {plan.method.name}"),
            "model": escape(name),
            "settings": _settings(plan),
            "summary": _summary(plan),
            "strip": strip(plan),
            "style": _asset("page.css"),
            "encoding": encoding,
            "data": stored,
            "script": "\n".join(_asset(file) for file in _SCRIPTS),
        },
    )


def encoded(text: str) -> tuple[str, str]:
    """How a JSON text is written, and the text: as it is, or deflated if longer than `PLAIN_LIMIT`.

    Nothing in it can end the element that it stands in.
    """
    if len(text) <= PLAIN_LIMIT:
        return "json", text.replace("<", "\\u003c")
    return "deflate", base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _relative(graph: Sequence[Any]) -> list[Any]:
    """A drawing whose line numbers count from the one before, so that layers alike are written alike."""
    boxes, last = [], 0
    for box in graph[0]:
        numbers = box[4:]
        boxes.append([*box[:4], *(number - before for before, number in pairwise([last, *numbers]))])
        last = numbers[-1] if numbers else last
    return [boxes, *graph[1:]]


def _filled(template: str, slots: Mapping[str, str]) -> str:
    """The template with its slots filled, once: what fills one is not read again."""
    return _SLOT.sub(lambda slot: slots[slot[1]], template)


def _asset(name: str) -> str:
    return (importlib.resources.files("kfac_fx.export") / "assets" / name).read_text(encoding="utf-8")


def _settings(plan: Plan) -> str:
    """Method and what else was chosen."""
    nodes = len(plan.capture.graph.graph.nodes)
    parts = (
        *settings(plan),
        ("captured", counted(nodes, "node")),
        ("loss", plan.capture.loss_info.note),
    )
    return "".join(f"<span><i>{escape(name)}</i> {escape(value)}</span>" for name, value in parts)


def _summary(plan: Plan) -> str:
    """Three answers: what is covered, what is not and why, what a step costs."""
    sums = totals(plan)
    return "".join([_covered(plan, sums), _left_out(plan, sums), _work(sums)])


def _card(title: str, figure: str, body: str) -> str:
    heading = f'<h2>{escape(title)}</h2><p class="figure">{escape(figure)}</p>'
    return f'<section class="card">{heading}{body}</section>'


def _covered(plan: Plan, sums: Totals) -> str:
    bytes_each = sums.parameter_bytes
    times = f" ({sums.cost.state_bytes / bytes_each:,.1f} times as many)" if bytes_each else ""
    share = f'<div class="share"><i style="width:{plan.coverage:.2%}"></i></div>'
    text = (
        f"{counted(sums.layers, 'layer')}, {sums.matched:,} of "
        f"{counted(sums.trainable, 'trainable parameter')}. Parameters: {bytes_text(sums.parameter_bytes)} "
        f"bytes; curvature state: {bytes_text(sums.cost.state_bytes)} bytes{times}."
    )
    return _card("Preconditioned", part_text(plan.coverage), f"{share}<p>{escape(text)}</p>")


def _left_out(plan: Plan, sums: Totals) -> str:
    if not plan.skipped:
        return _card("Skipped", "nothing", "<p>Every trainable parameter is preconditioned.</p>")
    reasons = "".join(_reason(reason, rows) for reason, rows in skip_rows(plan.skipped).items())
    took = (
        f"{counted(sums.skipped, 'parameter')} {'takes' if sums.skipped == 1 else 'take'} the plain gradient"
    )
    frozen = f"; frozen: {tensors_text(sums.frozen_tensors)}" if sums.frozen_tensors else ""
    text = f"{took}{frozen}. Tensors by reason{', frozen ones too' if frozen else ''}:"
    figure = tensors_text(sums.skipped_tensors)
    return _card("Skipped", figure, f'<p>{escape(text)}</p><ul class="reasons">{reasons}</ul>')


def _reason(reason: Reason, rows: Sequence[SkipRow]) -> str:
    """Code and number of tensors, and why in words: the first detail, and how many others there are."""
    details = list(dict.fromkeys(row.detail for row in rows))
    others = f"; {counted(len(details) - 1, 'other detail')}" if len(details) > 1 else ""
    tensors = sum(len(row.members) for row in rows)
    return (
        f'<li><a href="#skipped" title="{escape(reason.advice)}"><b>{escape(reason.value)}</b> {tensors}</a> '
        f"<span>{escape(details[0] + others)}</span></li>"
    )


def _work(sums: Totals) -> str:
    total = sums.overhead("total")
    if total is None:
        return _card("Extra work per step", "unknown", "<p>The model itself has no counted FLOPs.</p>")
    often = {
        "apply": "every step",
        "statistics": _every(sums.statistics_every),
        "inversion": _every(sums.inverse_every),
    } | dict.fromkeys(sums.off, "off")
    flops = {"apply": sums.cost.apply, "statistics": sums.cost.statistics, "inversion": sums.cost.inversion}
    shares = {phase: sums.overhead(phase) or 0.0 for phase in often}
    bar = "".join(
        f'<i class="{phase}" style="width:{share / total if total else 0:.2%}"></i>'
        for phase, share in shares.items()
    )
    lines = "".join(
        f'<tr><td><i class="dot {phase}"></i>{"refresh" if phase == "inversion" else phase}</td>'
        f"<td>{flops_text(flops[phase])}</td><td>{often[phase]}</td><td>{share_text(share)}</td></tr>"
        for phase, share in shares.items()
    )
    note = f"The model itself: {flops_text(sums.model_flops)} FLOPs. FLOPs are counted; no time was measured."
    body = (
        f'<div class="share parts">{bar}</div><table class="work">{lines}</table><p class="hint">{note}</p>'
    )
    return _card("Extra work per step, estimated", share_text(total), body)


def _every(steps: int) -> str:
    if not steps:
        return "never"
    return "every step" if steps == 1 else f"every {steps} steps"
