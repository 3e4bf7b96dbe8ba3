"""What the benchmarks save: JSON without infinities, with the machine, and folders made when needed."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path
from typing import Any

import torch

OUTPUT = Path("build/benchmarks")


def finite(value: Any) -> Any:
    """The same record with None for what is not a finite number, since JSON has no infinity."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save(record: dict[str, Any], path: Path) -> None:
    """Write a record, with the versions and the machine it was measured on."""
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(finite({"environment": environment, **record}), indent=1)
    path.write_text(text + "\n", encoding="utf-8")
