"""The methods as rows: what each is, stores, costs and is set to by default.

Enters: method classes by name. Leaves: records and one JSON document of plain values, schema
`kfac_fx.methods/1`; `kfac_fx.report.table` draws the same records.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from kfac_fx.report.document import plain

SCHEMA = "kfac_fx.methods/1"
NOTATION = (
    "Per layer: d_A inputs (with the bias) and d_G outputs, n rows of one batch, m columns of a thin factor. "
    "stored: elements of the state. Costs: FLOPs each time the phase runs, a multiply-add counts 2."
)
SCHEDULE = ("statistics_every", "inverse_every", "damping", "decay")
OPTIMIZER_SETTINGS = ("lr", "momentum", "betas", "weight_decay")


@final
@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """One method.

    defaults: every setting. optimizer: class name of the base optimizer; optimizer_settings: those of
    `OPTIMIZER_SETTINGS` that it has and that are not zero.
    """

    name: str
    summary: str
    paper: str
    stored: str
    statistics: str
    refresh: str
    apply: str
    defaults: Mapping[str, Any]
    optimizer: str
    optimizer_settings: Mapping[str, Any]

    @property
    def others(self) -> dict[str, Any]:
        """Settings that are not in `SCHEDULE`."""
        return {name: value for name, value in self.defaults.items() if name not in SCHEDULE}


def method_rows(methods: Mapping[str, type[Any]]) -> tuple[MethodRow, ...]:
    """A row for each method, with its defaults."""
    return tuple(_row(name, cls) for name, cls in methods.items())


def methods_json(methods: Mapping[str, type[Any]]) -> str:
    """The rows as indented JSON; what is not finite is a string."""
    rows = [dataclasses.asdict(row) for row in method_rows(methods)]
    content = {"schema": SCHEMA, "notation": NOTATION, "methods": rows}
    return json.dumps(plain(content), indent=2, sort_keys=True, allow_nan=False)


def settings_text(settings: Mapping[str, Any]) -> str:
    """`lr 0.01, momentum 0.9`."""
    return ", ".join(f"{name} {value_text(value)}" for name, value in settings.items())


def value_text(value: Any) -> str:
    """A setting's value as short as it is exact."""
    if isinstance(value, tuple):
        return f"({', '.join(value_text(item) for item in value)})"
    return repr(value) if isinstance(value, float) else str(value)


def _row(name: str, cls: type[Any]) -> MethodRow:
    method = cls()
    optimizer = method.base_optimizer([nn.Parameter(torch.zeros(1))])
    statistics, refresh, apply = method.costs
    chosen = {key: optimizer.defaults.get(key) for key in OPTIMIZER_SETTINGS}
    return MethodRow(
        name=name,
        summary=_summary(cls),
        paper=cls.paper,
        stored=method.stored,
        statistics=statistics,
        refresh=refresh,
        apply=apply,
        defaults={field.name: getattr(method, field.name) for field in dataclasses.fields(method)},
        optimizer=type(optimizer).__name__,
        optimizer_settings={key: value for key, value in chosen.items() if value},
    )


def _summary(cls: type[Any]) -> str:
    """The first paragraph of the docstring, in one line."""
    return " ".join((cls.__doc__ or "").strip().split("\n\n", 1)[0].split())
