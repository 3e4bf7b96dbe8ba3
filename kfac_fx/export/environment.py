"""What a folder of `kfac-fx transform` was made with: versions, machine, options, shapes.

Enters: a plan and its target. Leaves: `environment.json`, with sorted keys, without host name and without a
path of the user's machine.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from kfac_fx.errors import Reason
from kfac_fx.export.subject import Subject
from kfac_fx.planned import Plan
from kfac_fx.report.document import device_type, hyperparameters, version
from kfac_fx.target import Target

SCHEMA = "kfac_fx.environment/1"
FILE_NAME = "environment.json"


def environment(subject: Subject) -> Mapping[str, str]:
    """The part of the folder that says how to make it again."""
    document = environment_document(subject.plan, subject.target)
    return {FILE_NAME: json.dumps(document, indent=2, sort_keys=True) + "\n"}


def environment_document(plan: Plan, target: Target) -> dict[str, Any]:
    """Versions, platform, threads, options of the transformation, tensors of the captured step."""
    capture = plan.capture
    return {
        "schema": SCHEMA,
        "versions": _versions(),
        "platform": _platform(),
        "device": _device(plan),
        "threads": {
            "torch": torch.get_num_threads(),
            "interop": torch.get_num_interop_threads(),
            "processors": os.cpu_count(),
        },
        "target": target.label.replace(os.sep, "/").rsplit("/", 1)[-1],
        "model": {
            "class": capture.model_name,
            "module": type(target.model).__module__,
            "training": target.model.training,
            "parameters": len(capture.parameters),
            "buffers": len(capture.buffers),
            "dtypes": sorted({_dtype(parameter.dtype) for parameter in capture.parameters}),
        },
        "options": {
            "method": plan.method.name,
            "hyperparameters": hyperparameters(plan.method),
            "fisher": plan.fisher,
            "sharing": plan.sharing,
            "without": sorted(plan.without),
            "excluded": sorted(s.parameter for s in plan.skipped if s.reason is Reason.EXCLUDED),
        },
        "inputs": _tensors(capture.inputs),
        "targets": _tensors(capture.targets),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def _versions() -> dict[str, Any]:
    return {
        "kfac_fx": version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }


def _platform() -> dict[str, str]:
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "python_implementation": platform.python_implementation(),
    }


def _device(plan: Plan) -> dict[str, Any]:
    kind = device_type(plan)
    return {"type": kind, "name": torch.cuda.get_device_name() if kind == "cuda" else None}


def _tensors(nodes: Sequence[Node]) -> list[dict[str, Any]]:
    """Shape and dtype of each tensor of the batch, under its name in the saved programs."""
    read = [(node.name, node.meta["val"]) for node in nodes]
    return [{"name": n, "shape": list(v.shape), "dtype": _dtype(v.dtype)} for n, v in read]


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
