"""Time of a convolution's A, form by form: `python tests/benchmarks/gram_time.py`.

For each geometry the second moment of the patches (float32) by every form of `kfac_fx.forms`, traced and with
its tables as constants, as plans have it; next to what hook-based libraries do, `unfold` to rows and one
product (im2col), and next to the layer's own forward and weight gradient. Rounds go through all of them in
turn; figures are medians in milliseconds after one round that does not count. The ratio is im2col over the
form that the plan has; a star marks that form.

Saves build/benchmarks/gram_time.json. `--threads` is torch's number of threads (default 2).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from records import OUTPUT, save, table
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

import kfac_fx
from kfac_fx.bench.autotune import programs
from kfac_fx.bench.clock import in_turns
from kfac_fx.types import Use

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
FORMS = ("pixels", "patches", "shifts", "transform", "convolution")
AIM = 4.0  # least ratio of 3x3 kernels with stride 1 and 32 channels and more


def use_of(layer: nn.Conv2d, x: Tensor) -> Use:
    """The layer as a plan has it."""
    with torch.no_grad():
        targets = layer(x)
    (match,) = kfac_fx.inspect(layer, nn.MSELoss(), x, targets).matched
    return match.uses[0]


def im2col(x: Tensor, case: tuple[int, ...]) -> Tensor:
    """What a hook does: patches as rows, one product."""
    _, _, _, kernel, stride, padding = case
    rows = F.unfold(x, kernel, stride=stride, padding=padding).transpose(1, 2).flatten(0, 1)
    return rows.T @ rows


@torch.no_grad()
def medians(case: tuple[int, ...], repeats: int) -> tuple[dict[str, float], str]:
    """Milliseconds of everything that is timed for one geometry, and the form that a plan has."""
    num, channels, size, kernel, stride, padding = case
    layer = nn.Conv2d(channels, channels, kernel, stride=stride, padding=padding, bias=False)
    x, weight = torch.randn(num, channels, size, size), layer.weight
    g, use = torch.randn_like(layer(x)), use_of(layer, x)
    timed: dict[str, Callable[[int], Any]] = {
        "forward": lambda turn: F.conv2d(x, weight, stride=stride, padding=padding),
        "weight gradient": lambda turn: conv2d_weight(x, weight.shape, g, stride=stride, padding=padding),
        "im2col": lambda turn: im2col(x, case),
        **programs(use, backend="eager"),
    }
    in_turns(timed, 1, x.device)
    seconds = in_turns(timed, repeats, x.device)
    return {name: 1e3 * statistics.median(s) for name, s in seconds.items()}, use.options["form"]


def verdict(rows: list[dict[str, Any]]) -> str:
    """Whether the ratios are what they should be."""
    counted = [r for r in rows if r["case"][3:5] == (3, 1) and r["case"][1] >= 32]
    if not counted:
        return "no 3x3 convolution with stride 1 and 32 channels or more"
    least = min(counted, key=lambda row: row["ratio"])
    met = sum(row["ratio"] >= AIM for row in counted)
    return (
        f"3x3, stride 1, 32 channels and more: {met} of {len(counted)} at least {AIM:g} times faster than "
        f"im2col; least {least['ratio']:.1f} at N, C, size {least['case'][:3]}"
    )


def geometry(text: str) -> tuple[int, ...]:
    """One of `--geometry`: six whole numbers with commas between."""
    numbers = tuple(int(part) for part in text.split(","))
    if len(numbers) != len(GEOMETRIES[0]):
        raise argparse.ArgumentTypeError(f"{text} is not N,C,size,kernel,stride,padding")
    return numbers


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--geometry",
        type=geometry,
        action="append",
        metavar="N,C,SIZE,KERNEL,STRIDE,PADDING",
        help="repeatable; default: those of the README and more",
    )
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
        caption="ratio: im2col over the form that a plan has (*)",
    )
    rows = []
    for case in track(options.geometry or GEOMETRIES, description="geometries", transient=True):
        measured, chosen = medians(case, options.repeats)
        ratio = measured["im2col"] / measured[chosen]
        rows.append({"case": case, "chosen": chosen, "milliseconds": measured, "ratio": ratio})
        cells = [
            f"{measured[name]:.1f}{'*' if name == chosen else ''}" if name in measured else ""
            for name in ("forward", "weight gradient", "im2col", *FORMS)
        ]
        shown.add_row(f"{case[0]}, {case[1]}, {case[2]}", f"{case[3]} / {case[4]}", *cells, f"{ratio:.1f}")
    Console().print(shown)
    Console().print(verdict(rows), highlight=False, soft_wrap=True)
    save({"rows": rows}, options.output / "gram_time.json")


if __name__ == "__main__":
    main()
