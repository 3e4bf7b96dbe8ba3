"""A `Verification` as a JSON document, schema `kfac_fx.verify/1`.

Keys: schema, versions, model, method, fisher, sharing, precision, note, seconds, ok, whole (checks), layers
(in forward order, not collapsed: key, name, kind, weight, bias, rows, source, status, checks), skipped
(parameter, reason). A check: name, status ("ok", "violated", "not checked"), error, tolerance, detail,
reason; error and tolerance are null where it is not checked, and an error that is not finite is a string.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from kfac_fx.report.document import plain, source_document
from kfac_fx.verification.records import Check, LayerVerdict, Verification

SCHEMA = "kfac_fx.verify/1"


def document(verification: Verification) -> dict[str, Any]:
    """Everything that was found, exact numbers."""
    plan = verification.plan
    return plain(
        {
            "schema": SCHEMA,
            "versions": {"torch": torch.__version__},
            "model": plan.capture.model_name,
            "method": plan.method.name,
            "fisher": plan.fisher,
            "sharing": plan.sharing,
            "precision": verification.precision,
            "note": verification.note,
            "seconds": verification.seconds,
            "ok": verification.ok,
            "whole": [_check(check) for check in verification.whole],
            "layers": [_layer(verdict) for verdict in verification.layers],
            "skipped": [{"parameter": s.parameter, "reason": s.reason.value} for s in plan.skipped],
        }
    )


def to_json(verification: Verification) -> str:
    """The document as indented text."""
    return json.dumps(document(verification), indent=2, sort_keys=True, allow_nan=False)


def _layer(verdict: LayerVerdict) -> dict[str, Any]:
    layer = verdict.layer
    return {
        "key": layer.key,
        "name": layer.name,
        "kind": layer.kind,
        "weight": layer.weight,
        "bias": layer.bias,
        "rows": verdict.rows,
        "source": source_document(layer.source),
        "status": verdict.status,
        "checks": [_check(check) for check in verdict.checks],
    }


def _check(check: Check) -> dict[str, Any]:
    return {
        "name": check.name,
        "status": check.status,
        "error": check.error,
        "tolerance": None if check.error is None else check.tolerance,
        "detail": check.detail,
        "reason": check.reason,
    }
