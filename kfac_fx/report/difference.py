"""What changed between two reports: settings, layers, factors, costs, skipped parameters.

Enters: two documents of schema `kfac_fx.report/1`. Leaves: one document of schema `kfac_fx.diff/1`, of plain
values. Layers are the same if their keys are, parameters if their names are. Lines of the user's program and
names of nodes are not compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

SCHEMA = "kfac_fx.diff/1"
COSTS = ("bytes", "flops_statistics", "flops_refresh", "flops_apply")

_ABSENT = "(none)"
_LAYER_FACTS = (
    "kind",
    "structure",
    "weight",
    "bias",
    "part",
    "groups",
    "d_in",
    "d_out",
    "rows",
    "examples",
    "numel",
)
_SKIP_FACTS = ("reason", "detail", "numel")
_SETTINGS = ("model", "fisher", "sharing", "without")

Document = Mapping[str, Any]


def difference(before: Document, after: Document) -> dict[str, Any]:
    """Everything that differs. `same`: whether nothing does, versions and environment apart."""
    content = {
        "settings": _settings(before, after),
        "layers": _layers(before, after),
        "skips": _skips(before, after),
        "totals": _totals(before, after),
    }
    found = {
        "schema": SCHEMA,
        "models": {"before": before["model"], "after": after["model"]},
        "methods": {"before": before["method"]["name"], "after": after["method"]["name"]},
        "environment": [
            change
            for part in ("versions", "environment")
            for change in _changes(before[part], after[part], before[part] | after[part])
        ],
        "same": not _any(content),
        **content,
    }
    return json.loads(json.dumps(found, sort_keys=True, allow_nan=False))


def difference_json(found: Document) -> str:
    """The document as indented text with sorted keys."""
    return json.dumps(found, indent=2, sort_keys=True, allow_nan=False)


def _any(content: Document) -> bool:
    if any(content["settings"]) or any(entry["before"] != entry["after"] for entry in content["totals"]):
        return True
    parts = [entries for name in ("layers", "skips") for entries in content[name].values()]
    return any(entries for entries in parts if isinstance(entries, list))


def _changes(before: Document, after: Document, names: Iterable[str]) -> list[dict[str, Any]]:
    """Facts of these names that differ; one that only one side has is `(none)` on the other."""
    pairs = ((name, before.get(name, _ABSENT), after.get(name, _ABSENT)) for name in names)
    return [{"name": name, "before": old, "after": new} for name, old, new in pairs if old != new]


def _settings(before: Document, after: Document) -> list[dict[str, Any]]:
    """Model, method, its hyperparameters (those that both methods have, if it is another), loss."""
    old, new = before["method"], after["method"]
    changes = [
        *_changes(before, after, _SETTINGS),
        *_changes({"method": old["name"]}, {"method": new["name"]}, ["method"]),
    ]
    settings, others = old["hyperparameters"], new["hyperparameters"]
    names = (
        sorted(settings | others) if old["name"] == new["name"] else sorted(settings.keys() & others.keys())
    )
    changes += _changes(settings, others, names)
    for change in _changes(
        before["loss"], after["loss"], ("kind", "reduction", "examples", "terms", "unit", "ignores")
    ):
        changes.append(change | {"name": f"loss.{change['name']}"})
    return changes


def _layers(before: Document, after: Document) -> dict[str, Any]:
    old = {layer["key"]: layer for layer in before["layers"]}
    new = {layer["key"]: layer for layer in after["layers"]}
    common = [key for key in new if key in old]
    changed = [entry for key in common if (entry := _layer_change(old[key], new[key])) is not None]
    return {
        "before": len(old),
        "after": len(new),
        "unchanged": len(common) - len(changed),
        "added": [_brief(layer) for key, layer in new.items() if key not in old],
        "removed": [_brief(layer) for key, layer in old.items() if key not in new],
        "changed": changed,
    }


def _brief(layer: Document) -> dict[str, Any]:
    sizes = {factor["side"]: size_text(factor) for factor in layer["factors"]}
    return {
        "key": layer["key"],
        "name": layer["name"],
        "kind": layer["kind"],
        "factors": sizes,
        "cost": layer["cost"],
    }


def _layer_change(old: Document, new: Document) -> dict[str, Any] | None:
    changes = _changes(old, new, _LAYER_FACTS)
    if len(old["uses"]) != len(new["uses"]):
        changes.append({"name": "uses", "before": len(old["uses"]), "after": len(new["uses"])})
    sides = {side: {f["side"]: f for f in layer["factors"]} for side, layer in (("old", old), ("new", new))}
    for side in sorted(sides["old"] | sides["new"]):
        first, second = sides["old"].get(side), sides["new"].get(side)
        if first is None or second is None:
            entry = {
                "name": side,
                "before": first and size_text(first),
                "after": second and size_text(second),
            }
            changes.append({name: _ABSENT if value is None else value for name, value in entry.items()})
            continue
        if size_text(first) != size_text(second):
            changes.append({"name": side, "before": size_text(first), "after": size_text(second)})
        for change in _changes(first, second, ("dtype", "form", "shared_with")):
            changes.append(change | {"name": f"{side}.{change['name']}"})
    if not changes and old["cost"] == new["cost"]:
        return None
    cost = {"before": old["cost"], "after": new["cost"]}
    return {"key": new["key"], "name": new["name"], "kind": new["kind"], "changes": changes, "cost": cost}


def size_text(factor: Document) -> str:
    """`8x65^2`, `1000`, `65/32`, as the report prints sizes."""
    side = str(factor["dim"]) + ("" if factor["diagonal"] else "^2")
    if factor["columns"] is not None:
        side = f"{factor['dim']}/{factor['columns']}"
    return (f"{factor['count']}x" if factor["count"] > 1 else "") + side


def _skips(before: Document, after: Document) -> dict[str, Any]:
    old = {skip["parameter"]: skip for skip in before["skips"]}
    new = {skip["parameter"]: skip for skip in after["skips"]}
    changed = []
    for name, skip in new.items():
        changes = _changes(old[name], skip, _SKIP_FACTS) if name in old else []
        if changes:
            changed.append({"parameter": name, "changes": changes})
    kept = ("parameter", "reason", "detail", "numel")
    return {
        "new": [{fact: skip[fact] for fact in kept} for name, skip in new.items() if name not in old],
        "gone": [{fact: skip[fact] for fact in kept} for name, skip in old.items() if name not in new],
        "changed": changed,
    }


def _totals(before: Document, after: Document) -> list[dict[str, Any]]:
    """All figures of the whole, also those that are the same."""
    old, new = before["totals"], after["totals"]
    entries = [(name, old["cost"][name], new["cost"][name]) for name in COSTS]
    entries += [("flops_model", old["flops_model"], new["flops_model"])]
    entries += [("overhead", old["overhead"]["total"], new["overhead"]["total"])]
    entries += [("coverage", old["coverage"], new["coverage"])]
    return [{"name": name, "before": first, "after": second} for name, first, second in entries]
