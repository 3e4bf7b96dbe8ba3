"""The folder that `kfac-fx transform` leaves behind.

Enters: a plan, the programs written for it and a folder. Leaves: the files, and their paths. Existing files
of the same names are replaced; nothing else in the folder is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.fx import GraphModule

from kfac_fx.contracts import Plan
from kfac_fx.errors import KfacFxError
from kfac_fx.report.document import to_json
from kfac_fx.report.program import readable
from kfac_fx.report.text import render


def save(plan: Plan, programs: Mapping[str, GraphModule], folder: Path) -> tuple[Path, ...]:
    """Write `summary.txt`, `report.json` and one readable `.py` per program; the paths in that order."""
    contents = {"summary.txt": render(plan) + "\n", "report.json": to_json(plan) + "\n"}
    for name, module in programs.items():
        title = f"{plan.capture.model_name}: {name} (method {plan.method.name}, fisher {plan.fisher})"
        contents[f"{name}.py"] = readable(module, title=title)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (folder / name).write_text(content, encoding="utf-8")
    except OSError as error:
        raise KfacFxError(f"cannot write to {folder}: {error.strerror}. Choose another folder.") from error
    return tuple(folder / name for name in contents)
