"""Time of a convolution's A, form by form: `python tests/benchmarks/gram_time.py`.

For each geometry the second moment of the patches (float32) by every form of `kfac_fx.forms`, next to what
hook-based libraries do: `unfold` to rows and one product (im2col), and next to the layer's own forward and
weight gradient. Rounds go through all of them in turn; figures are medians in milliseconds after one round
that does not count. The ratio is im2col over the form that the plan would choose; a star marks that form.

Saves build/benchmarks/gram_time.json. `--threads` is torch's number of threads (default 2).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from records import OUTPUT, save, table
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.grad import conv2d_weight

from kfac_fx.autocorrelation import patch_moment
from kfac_fx.forms import choose, costs
from kfac_fx.layout import Geometry, output_sizes

# examples, channels, pixels per axis, kernel, stride, padding
GEOMETRIES = (
    (64, 16, 32, 3, 1, 1),
    (64, 32, 32, 3, 1, 1),
    (64, 64, 32, 3, 1, 1),
    (64, 64, 16, 3, 1, 1),
    (64, 128, 16, 3, 1, 1),
    (64, 128, 8, 3, 1, 1),
    (64, 256, 8, 3, 1, 1),
    (16, 64, 56, 3, 1, 1),
    (32, 512, 7, 3, 1, 1),
    (64, 32, 32, 5, 1, 2),
    (64, 3, 32, 3, 1, 1),
    (64, 32, 32, 3, 2, 1),
    (64, 64, 16, 3, 2, 1),
    (8, 3, 224, 7, 2, 3),
    (16, 3, 224, 16, 16, 0),
    (64, 32, 32, 1, 1, 0),
    (16, 256, 28, 1, 2, 0),
)
FORMS = ("pixels", "patches", "transform", "convolution")


def geometry_of(case: tuple[int, ...]) -> Geometry:
    """The geometry of one row of `GEOMETRIES`."""
    _, _, size, kernel, stride, padding = case
    return Geometry(
        kernel=(kernel, kernel),
        stride=(stride, stride),
        padding=(padding, padding),
        dilation=(1, 1),
        groups=1,
        space=(size, size),
    )


def im2col(x: Tensor, case: tuple[int, ...]) -> Tensor:
    """What a hook does: patches as rows, one product."""
    _, _, _, kernel, stride, padding = case
    rows = F.unfold(x, kernel, stride=stride, padding=padding).transpose(1, 2).flatten(0, 1)
    return rows.T @ rows


def contenders(case: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """Everything that is timed for one geometry."""
    num, channels, size, kernel, stride, padding = case
    geometry = geometry_of(case)
    x, weight = torch.randn(num, channels, size, size), torch.randn(channels, channels, kernel, kernel)
    g = torch.randn(num, channels, *output_sizes(geometry))
    timed: dict[str, Callable[[], Any]] = {
        "forward": lambda: F.conv2d(x, weight, stride=stride, padding=padding),
        "weight gradient": lambda: conv2d_weight(x, weight.shape, g, stride=stride, padding=padding),
        "im2col": lambda: im2col(x, case),
    }
    for cost in costs(geometry, examples=num, channels=channels):
        timed[cost.form] = lambda form=cost.form: patch_moment(x, geometry, form)
    return timed


def medians(timed: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Milliseconds of each, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for repeat in range(repeats + 1):
        for name, run in timed.items():
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shown = table(
        "Milliseconds for the second moment of a convolution's patches",
        left=["N, C, size", "kernel / stride"],
        right=["forward", "weight gradient", "im2col", *FORMS, "ratio"],
        caption="ratio: im2col over the form that a plan chooses (*)",
    )
    rows = []
    for case in track(GEOMETRIES, description="geometries", transient=True):
        measured = medians(contenders(case), options.repeats)
        chosen = choose(geometry_of(case), examples=case[0], channels=case[1]).form
        ratio = measured["im2col"] / measured[chosen]
        rows.append({"case": case, "chosen": chosen, "milliseconds": measured, "ratio": ratio})
        cells = [
            f"{measured[name]:.1f}{'*' if name == chosen else ''}" if name in measured else ""
            for name in ("forward", "weight gradient", "im2col", *FORMS)
        ]
        shown.add_row(f"{case[0]}, {case[1]}, {case[2]}", f"{case[3]} / {case[4]}", *cells, f"{ratio:.1f}")
    Console().print(shown)
    save({"rows": rows}, options.output / "gram_time.json")


if __name__ == "__main__":
    main()
