"""The report of a `Plan` as a JSON document, schema `kfac_fx.report/1`.

Enters: a plan. Leaves: dicts, lists, strings and numbers only, keys sorted, no path of the user's machine, so
that two reports can be compared line by line. `report.schema.json` in this folder describes every field.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kfac_fx.contracts import Method
from kfac_fx.planned import Plan
from kfac_fx.report.rows import (
    Cost,
    LayerRow,
    Totals,
    cost_of,
    estimated_ns,
    factors_by_layer,
    forward_order,
    gram_form,
    layer_rows,
    phases_off,
    totals,
)
from kfac_fx.types import FactorSpec, LayerMatch, Skip, Source, Use

SCHEMA = "kfac_fx.report/1"
SCHEMA_FILE = Path(__file__).with_name("report.schema.json")


def document(plan: Plan) -> dict[str, Any]:
    """Everything the report knows, exact numbers. `layers` are in forward order; `rows` collapse them."""
    layers, owned, off = forward_order(plan), factors_by_layer(plan), phases_off(plan)
    content = {
        "schema": SCHEMA,
        "versions": {"torch": torch.__version__, "kfac_fx": version()},
        "environment": {"python": platform.python_version(), "device": device_type(plan)},
        "model": plan.capture.model_name,
        "method": {"name": plan.method.name, "hyperparameters": hyperparameters(plan.method)},
        "without": sorted(plan.without),
        "fisher": plan.fisher,
        "sharing": plan.sharing,
        "loss": dataclasses.asdict(plan.capture.loss_info),
        "totals": _totals(totals(plan), plan.coverage),
        "layers": [_layer(match, owned[match.key], off) for match in layers],
        "rows": [_row(row) for row in layer_rows(plan, layers, collapse=True)],
        "skips": [_skip(skip) for skip in plan.skipped],
    }
    return json.loads(json.dumps(content, sort_keys=True, allow_nan=False))


def to_json(plan: Plan) -> str:
    """The document as indented text."""
    return json.dumps(document(plan), indent=2, sort_keys=True, allow_nan=False)


def version() -> str:
    """The installed version of kfac_fx, "source" when it is not installed."""
    try:
        return importlib.metadata.version("kfac_fx")
    except importlib.metadata.PackageNotFoundError:
        return "source"


def device_type(plan: Plan) -> str:
    """Type of the device that the model's parameters are on, as torch names it; "none" without parameters."""
    devices = {parameter.node.meta["val"].device.type for parameter in plan.capture.parameters}
    return ",".join(sorted(devices)) or "none"


def hyperparameters(method: Method) -> dict[str, Any]:
    """All settings of the method, as JSON has them; one that it does not have, such as a dtype, as text."""
    assert dataclasses.is_dataclass(method) and not isinstance(method, type), "a method is a dataclass"
    return json.loads(json.dumps(plain(dataclasses.asdict(method)), default=str, allow_nan=False))


def plain(value: Any) -> Any:
    """The value as JSON has it: lists for tuples, a string for a number that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def source_document(source: Source | None) -> dict[str, Any] | None:
    """File without its folder, line and code."""
    if source is None:
        return None
    return {"file": source.name, "line": source.line, "code": source.code.strip()}


def _totals(sums: Totals, coverage: float) -> dict[str, Any]:
    return {
        "layers": sums.layers,
        "nodes": sums.nodes,
        "coverage": coverage,
        "parameters": {
            "trainable": sums.trainable,
            "matched": sums.matched,
            "skipped": sums.skipped,
            "bytes": sums.parameter_bytes,
        },
        "tensors": {"skipped": sums.skipped_tensors, "frozen": sums.frozen_tensors},
        "cost": _cost(sums.cost),
        "flops_model": sums.model_flops,
        "flops_fisher": sums.fisher_flops,
        "overhead": {phase: sums.overhead(phase) for phase in ("apply", "statistics", "inversion", "total")},
    }


def _cost(cost: Cost) -> dict[str, int]:
    return {
        "bytes": cost.state_bytes,
        "flops_statistics": cost.statistics,
        "flops_refresh": cost.inversion,
        "flops_apply": cost.apply,
    }


def _layer(match: LayerMatch, factors: Sequence[FactorSpec], off: frozenset[str]) -> dict[str, Any]:
    return {
        "name": match.name,
        "key": match.key,
        "kind": match.kind,
        "structure": match.structure,
        "weight": match.weight,
        "bias": match.bias,
        "part": match.part,
        "groups": match.groups,
        "d_in": match.d_in,
        "d_out": match.d_out,
        "rows": match.rows,
        "examples": match.examples,
        "numel": match.numel,
        "uses": [_use(use) for use in match.uses],
        "source": source_document(match.source),
        "cost": _cost(cost_of(factors, off=off)),
        "factors": [_factor(factor, match) for factor in factors],
    }


def _row(row: LayerRow) -> dict[str, Any]:
    """A row of the printed table, with the cost of all its layers."""
    return {
        "label": row.label,
        "count": row.count,
        "kind": row.first.kind,
        "layers": [match.key for match in row.members],
        "cost": _cost(row.total),
    }


def _use(use: Use) -> dict[str, Any]:
    """Names of the nodes, as the saved programs print them."""
    return {"a": use.a.name if use.a else None, "g": [node.name for node in use.g], "grad": use.grad.name}


def _factor(factor: FactorSpec, match: LayerMatch) -> dict[str, Any]:
    return {
        "side": factor.side,
        "dim": factor.dim,
        "count": factor.count,
        "columns": factor.columns,
        "diagonal": factor.diagonal,
        "dtype": str(factor.dtype).removeprefix("torch."),
        "bytes": factor.bytes,
        "flops_statistics": factor.flops_statistics,
        "flops_refresh": factor.flops_refresh,
        "flops_apply": factor.flops_apply,
        "form": factor.form,
        "gram": gram_form(match, factor) or None,
        "estimated_ns": estimated_ns(match, factor),
        "shared_with": factor.shared_with,
    }


def _skip(skip: Skip) -> dict[str, Any]:
    return {
        "parameter": skip.parameter,
        "reason": skip.reason.value,
        "detail": skip.detail,
        "numel": skip.numel,
        "source": source_document(skip.source),
        "advice": skip.advice,
    }
