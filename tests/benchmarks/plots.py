"""Line plots of the benchmarks: named curves on shared axes, saved as PNG. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":")


@final
@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes: curves (x, y) by name; a marker per point if `points`, and lines across at `levels`.

    log_x: a logarithmic axis, labelled at the first curve's points. ceiling: larger values, infinite ones
    too, are drawn at this height.
    """

    title: str
    x_label: str
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    log_x: bool = False
    points: bool = False
    levels: tuple[float, ...] = ()
    ceiling: float = math.inf


def save_panels(panels: Sequence[Panel], *, y_label: str, path: Path) -> None:
    """Draw panels side by side with one legend; a name has the same colour and dashes in all of them."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    styles = {
        name: {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}
        for i, name in enumerate(names)
    }
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6 * len(panels), 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        _draw(axis, panel, styles)
    axes[0][0].set_ylabel(y_label)
    lines = {
        line.get_label(): line for axis in axes[0] for line in axis.get_lines() if line.get_label() in names
    }
    figure.legend([lines[name] for name in names], names, loc="outside right upper", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw(axis: Axes, panel: Panel, styles: Mapping[str, Mapping[str, Any]]) -> None:
    for name, (x, y) in panel.curves.items():
        heights = [min(value, panel.ceiling) for value in y]
        axis.plot(x, heights, label=name, marker="o" if panel.points else None, linewidth=1.4, **styles[name])
    for level in panel.levels:
        axis.axhline(level, color="grey", linewidth=0.8)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="y", which="minor", labelsize=7)
    if panel.log_x:
        ticks = next(iter(panel.curves.values()))[0]
        axis.set_xscale("log")
        axis.set_xticks(ticks, labels=[f"{x:.3g}" for x in ticks])
        axis.xaxis.set_minor_formatter("")
    axis.set_title(panel.title)
    axis.set_xlabel(panel.x_label)
    axis.grid(alpha=0.3)
