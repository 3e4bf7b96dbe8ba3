"""What the benchmarks print and save: tables, and JSON with the machine it was measured on."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

OUTPUT = Path("build/benchmarks")


def finite(value: Any) -> Any:
    """The same record with None for what is not a finite number, since JSON has no infinity."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save(record: dict[str, Any], path: Path) -> None:
    """Write a record, with the versions and the machine; a folder that is missing is made."""
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(finite({"environment": environment, **record}), indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def table(title: str, *, left: Iterable[str], right: Iterable[str], caption: str | None = None) -> Table:
    """An empty table without vertical lines: columns of names on the left, of numbers on the right."""
    made = Table(title=title, caption=caption, box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for heading in left:
        made.add_column(heading)
    for heading in right:
        made.add_column(heading, justify="right")
    return made
