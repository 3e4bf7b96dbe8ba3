"""The difference of two reports as lines for a terminal or as plain text.

Enters: a document of schema `kfac_fx.diff/1`. Leaves: lines of (text, role); layers that changed alike share
one. `+` is only in the second report, `-` only in the first, `~` in both and different.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from kfac_fx.report.collapse import collapsed
from kfac_fx.report.difference import COSTS
from kfac_fx.report.lines import GAP, Line, broken, line, wrapped
from kfac_fx.report.numbers import bytes_text, flops_text, part_text

_LABELS = {
    "bytes": "state",
    "flops_statistics": "stats",
    "flops_refresh": "refresh",
    "flops_apply": "apply",
    "flops_model": "model",
    "overhead": "per step",
    "coverage": "matched",
}
_WIDEST_LABEL = 44
_INDENT = 10
_TOO_SMALL = "costs differ by less than is printed"
_NAMES_NOTE = "~ changed   + only in the second   - only in the first   costs of all x layers together"

Entry = Mapping[str, Any]


def difference_lines(found: Entry, *, names: tuple[str, str], width: int | None = None) -> list[Line]:
    """The report. names: what to call the two sides. width: characters per line, None for no limit."""
    lines = broken([f"kfac-fx diff  {names[0]}", f"->  {names[1]}"], width=width, indent=14, role="title")
    if found["same"]:
        lines += wrapped("no differences", width=width, indent=0)
    lines += _listed("versions", found["environment"], width)
    if found["same"]:
        return lines
    lines += _listed("settings", found["settings"], width)
    lines += _layer_lines(found["layers"], width)
    lines += _skip_lines(found["skips"], width)
    return [*lines, line(""), *_total_lines(found["totals"])]


def _listed(title: str, changes: Sequence[Entry], width: int | None) -> list[Line]:
    if not changes:
        return []
    texts = [_change_text(change) for change in changes]
    return broken([f"{title:<{_INDENT}}{texts[0]}", *texts[1:]], width=width, indent=_INDENT)


def _change_text(change: Entry) -> str:
    return f"{change['name']} {_value(change['before'])} -> {_value(change['after'])}"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_value, value)) or "(none)"
    return value if isinstance(value, str) else json.dumps(value)


def _layer_lines(layers: Entry, width: int | None) -> list[Line]:
    counts = [f"{len(layers[kind]):,} {kind}" for kind in ("added", "removed", "changed")]
    title = f"{'layers':<{_INDENT}}{layers['before']:,} -> {layers['after']:,}"
    lines = broken([title, *counts, f"{layers['unchanged']:,} the same"], width=width, indent=_INDENT)
    rows: list[tuple[str, str, list[str], str]] = []
    for kind, mark, role in (("added", "+", "more"), ("removed", "-", "less")):
        for label, members in _groups(layers[kind], _brief_facts):
            first = members[0]
            sizes = [f"{side} {size}" for side, size in first["factors"].items()]
            costs = [f"{_LABELS[name]} {_cost(name, members)}" for name in COSTS]
            rows.append((f"{mark} {label}", role, [first["kind"], *sizes, *costs], str(len(members))))
    for label, members in _groups(layers["changed"], _changed_facts):
        facts = [_change_text(change) for change in members[0]["changes"]]
        costs = [text for name in COSTS if (text := _cost_change(name, members))]
        size = [sum(m["cost"][side]["bytes"] for m in members) for side in ("before", "after")]
        role = "" if size[0] == size[1] else "more" if size[1] > size[0] else "less"
        rows.append((f"~ {label}", role, [*facts, *costs] or [_TOO_SMALL], str(len(members))))
    longest = min(max((len(row[0]) for row in rows), default=0), _WIDEST_LABEL)
    for label, role, facts, count in rows:
        title = f"{GAP}{label:<{longest}}{GAP}{'x' + count if count != '1' else '':<4}"
        lines += broken([title, *facts], width=width, indent=6, role=role)
    return [*lines, *(wrapped(_NAMES_NOTE, width=width, indent=2, role="note") if rows else [])]


def _groups(
    entries: Sequence[Entry], facts: Callable[[Entry], Hashable]
) -> Iterable[tuple[str, list[Entry]]]:
    """Entries with the same facts under one pattern, in order of first appearance."""
    names = [entry["name"] for entry in entries]
    labels = [e["name"] if e["name"] and names.count(e["name"]) == 1 else e["key"] for e in entries]
    alike: dict[Hashable, list[int]] = {}
    for index, entry in enumerate(entries):
        alike.setdefault(facts(entry), []).append(index)
    for members in alike.values():
        for label, places in collapsed([labels[index] for index in members]):
            yield label, [entries[members[place]] for place in places]


def _brief_facts(entry: Entry) -> Hashable:
    return json.dumps({name: entry[name] for name in ("kind", "factors", "cost")}, sort_keys=True)


def _changed_facts(entry: Entry) -> Hashable:
    changes = [change for change in entry["changes"] if not change["name"].endswith("shared_with")]
    names = [change["name"] for change in entry["changes"]]
    return json.dumps([entry["kind"], names, changes, entry["cost"]], sort_keys=True)


def _number(name: str, value: float) -> str:
    return bytes_text(int(value)) if name == "bytes" else flops_text(int(value))


def _cost(name: str, members: Sequence[Entry]) -> str:
    return _number(name, sum(member["cost"][name] for member in members))


def _cost_change(name: str, members: Sequence[Entry]) -> str:
    """Nothing if both sides print the same."""
    before, after = (sum(m["cost"][side][name] for m in members) for side in ("before", "after"))
    old, new = _number(name, before), _number(name, after)
    share = _share(before, after)
    return "" if old == new else f"{_LABELS[name]} {old} -> {new}{share and f' ({share})'}"


def _share(before: float, after: float) -> str:
    return f"{(after - before) / before:+,.1%}" if before else ""


def _skip_lines(skips: Entry, width: int | None) -> list[Line]:
    if not any(skips.values()):
        return []
    counts = [f"{len(skips[kind]):,} {kind}" for kind in ("new", "gone", "changed")]
    lines = broken([f"{'skipped':<{_INDENT}}{counts[0]}", *counts[1:]], width=width, indent=_INDENT)
    for kind, mark, role in (("new", "+", "more"), ("gone", "-", "less")):
        for label, members in _skip_groups(skips[kind], ("reason", "detail")):
            count = [f"x{len(members)}"] if len(members) > 1 else []
            facts = [f"{GAP}{mark} {label}", *count, members[0]["reason"], members[0]["detail"]]
            lines += broken(facts, width=width, indent=6, role=role)
    for label, members in _skip_groups(skips["changed"], ("changes",)):
        count = [f"x{len(members)}"] if len(members) > 1 else []
        changes = [_change_text(change) for change in members[0]["changes"]]
        lines += broken([f"{GAP}~ {label}", *count, *changes], width=width, indent=6)
    return lines


def _skip_groups(entries: Sequence[Entry], facts: Sequence[str]) -> Iterable[tuple[str, list[Entry]]]:
    alike: dict[str, list[Entry]] = {}
    for entry in entries:
        alike.setdefault(json.dumps([entry[fact] for fact in facts], sort_keys=True), []).append(entry)
    for members in alike.values():
        for label, places in collapsed([entry["parameter"] for entry in members]):
            yield label, [members[place] for place in places]


def _total_lines(totals: Sequence[Entry]) -> list[Line]:
    rows = [("total", "before", "after", "change", "head")]
    for entry in totals:
        name, before, after = entry["name"], entry["before"], entry["after"]
        role = "" if before == after or None in (before, after) else "more" if after > before else "less"
        if name in ("overhead", "coverage"):
            old, new = (_percent(name, value) for value in (before, after))
            change = f"{(after - before) * 100:+,.1f} points" if role else ""
        else:
            old, new = _number(name, before), _number(name, after)
            change = _share(before, after) if role else ""
        rows.append((_LABELS[name], old, new, change or "the same" if role == "" else change, role))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        line(
            GAP.join(
                t.ljust(w) if i == 0 else t.rjust(w)
                for i, (t, w) in enumerate(zip(row[:4], widths, strict=True))
            ),
            row[4],
        )
        for row in rows
    ]


def _percent(name: str, value: float | None) -> str:
    """As the report has it, but of any overhead one digit: as many as of its change."""
    if value is None:
        return "-"
    return f"{value:+.1%}" if name == "overhead" else part_text(value)
