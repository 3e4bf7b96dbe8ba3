"""Spectra of the factors as a plot: a panel for each layer or several alike, log scales, damping as a line.

Enters: a `StepReport`. Leaves: a file by matplotlib, which is looked for at the first use only.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kfac_fx.live import FactorHealth, LayerHealth, StepReport
from kfac_fx.wording import counted

_COLORS: Mapping[str, str] = {
    "A": "#1b7f79",
    "Sigma": "#1b7f79",
    "G": "#b8741a",
    "F": "#5b5f97",
    "S": "#444444",
}
_COLUMNS, _PANELS, _LONGEST = 4, 24, 30
_DASHES = (0, (4, 2))


def draw(report: StepReport, file: Path, *, title: str) -> None:
    """Write the plot of all layers, or of the worst-conditioned ones if they are too many for a page."""
    groups = _groups(report)
    columns = min(_COLUMNS, max(math.ceil(len(groups) ** 0.5), 1))
    rows = math.ceil(len(groups) / columns) or 1
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(max(3.1 * columns, 6.4), 2.6 * rows + 1.1), layout="constrained"
    )
    panels = figure.subplots(rows, columns, squeeze=False)
    for index, panel in enumerate(panels.flat):
        if index >= len(groups):
            panel.set_axis_off()
            continue
        _panel(panel, groups[index])
        if index % columns == 0:
            panel.set_ylabel("eigenvalue", fontsize=8)
        if index + columns >= len(groups):
            panel.set_xlabel("index, largest first", fontsize=8)
    figure.suptitle(_title(report, title, shown=len(groups)), fontsize=10)
    figure.savefig(file, dpi=150)


def drawn(factor: FactorHealth) -> Tensor:
    """Eigenvalues that are not zero up to the rounding of float32, largest first."""
    assert factor.eigenvalues is not None, "only factors with eigenvalues are drawn"
    values = factor.eigenvalues.flip(0)
    return values[values > factor.dim * torch.finfo(torch.float32).eps * values[:1]]


def _groups(report: StepReport) -> list[list[LayerHealth]]:
    """Layers with eigenvalues by group, in the order of the forward."""
    groups: dict[str, list[LayerHealth]] = {}
    for layer in report.layers:
        if any(factor.eigenvalues is not None for factor in layer.factors):
            groups.setdefault(layer.group, []).append(layer)
    worst = sorted(groups, key=lambda name: -max(layer.severity for layer in groups[name]))[:_PANELS]
    return [layers for name, layers in groups.items() if name in worst]


def _title(report: StepReport, title: str, *, shown: int) -> str:
    total = len({layer.group for layer in report.layers})
    left = f"; {shown} of {total} kinds of layers" if shown < total else ""
    lines = "dashed: the damping that is added" if any(_dampings(report.layers)) else ""
    inside = "eigenvalues of the damped factors" if report.method in ("singd", "ikfac") else ""
    head = f"{title}: {report.method} after {counted(report.steps, 'step')}{left}"
    return f"{head}\n{lines or inside or 'no damping of single factors'}"


def _dampings(layers: Sequence[LayerHealth]) -> list[float]:
    return [factor.damping for layer in layers for factor in layer.factors if factor.damping]


def _panel(panel: Any, layers: Sequence[LayerHealth]) -> None:
    """Curves of all layers of a group; the figures in the legend are those of the worst-conditioned one."""
    handles, count = [], len(layers)
    for index, first in enumerate(layers[0].factors):
        factors = [layer.factors[index] for layer in layers if layer.factors[index].eigenvalues is not None]
        color = _COLORS.get(first.side, "#444444")
        for factor in factors:
            values = drawn(factor)
            style = {
                "color": color,
                "linewidth": 1.6 if count == 1 else 1.1,
                "alpha": 1.0 if count == 1 else 0.7,
            }
            marks = {"marker": "o", "markersize": 2.5 if len(values) < 40 else 0}
            panel.plot(range(1, len(values) + 1), values.tolist(), **style, **marks)
            if factor.damping:
                panel.axhline(factor.damping, color=color, linewidth=0.9, linestyle=_DASHES, alpha=0.8)
        if factors:
            worst = max(factors, key=lambda factor: factor.severity)
            handles.append((panel.plot([], [], color=color, linewidth=2)[0], _label(worst)))
    panel.set(xscale="log", yscale="log")
    panel.set_title(_shortened(layers[0].group) + (f"  x{count}" if count > 1 else ""), fontsize=9)
    panel.tick_params(labelsize=7)
    panel.grid(color="#dddddd", linewidth=0.5)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    curves, labels = zip(*handles, strict=True)
    # Below the curves and the damping, where nothing is drawn.
    low, high = panel.get_ylim()
    panel.set_ylim(low / (high / low) ** (0.16 * len(labels)), high)
    panel.legend(
        curves, labels, loc="lower left", fontsize=6.5, frameon=False, handlelength=1.2, borderpad=0.1
    )


def _label(factor: FactorHealth) -> str:
    """`A 145: eff. rank 5.0, 12 zero`."""
    zeros = factor.dim - len(drawn(factor))
    rank = f"eff. rank {factor.effective_rank:.1f}"
    return f"{factor.side} {factor.dim}: {rank}" + (f", {zeros:,} zero" if zeros else "")


def _shortened(name: str) -> str:
    """The end of a long path, which tells layers apart."""
    return name if len(name) <= _LONGEST else f"..{name[2 - _LONGEST :]}"
