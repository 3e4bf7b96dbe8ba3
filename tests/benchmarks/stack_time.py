"""Plain steps of equal layers that are preconditioned in one call: `python tests/benchmarks/stack_time.py`.

Training steps of `kfac` without statistics or refresh, for networks of equal linear layers: each gradient by
itself, and all in one stack, in turns. Figures are medians in microseconds after rounds that do not count;
the ratio is apart over stacked, so above 1 the stack is faster. A star marks what a plan chooses by its
estimate (`kfac_fx/stacking.py`, whose rates were fitted to this table).

Saves build/benchmarks/stack_time.json. `--threads` is torch's number of threads (default 2).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from records import OUTPUT, save, table
from rich.console import Console
from rich.progress import track
from torch import nn

import kfac_fx
from kfac_fx import directions
from kfac_fx.bench.clock import in_turns
from kfac_fx.stacking import stacking_pays

LAYERS, WIDTHS = (4, 12), (8, 16, 32, 48, 64, 96, 128, 256)
CHOICES = ("apart", "stacked")
EXAMPLES = 32


def step_of(
    num_layers: int, width: int, device: torch.device, pays: Callable[..., bool]
) -> Callable[[int], Any]:
    """A plain step, with its program written. pays: whether layers of one shape are stacked."""
    torch.manual_seed(0)
    layers = [part for _ in range(num_layers) for part in (nn.Linear(width, width), nn.Tanh())]
    model = nn.Sequential(*layers).to(device)
    batch = torch.randn(2, EXAMPLES, width, device=device)
    method = kfac_fx.KFAC(statistics_every=10**6, inverse_every=10**6)
    step = kfac_fx.compile(model, F.mse_loss, method=method)
    with mock.patch.object(directions, "stacking_pays", pays):
        for _ in range(3):
            step(batch[0], batch[1])
    return lambda turn: step(batch[0], batch[1])


def choice(num_layers: int, width: int, device: torch.device) -> str:
    """What the plan chooses."""
    found: list[bool] = []

    def noted(*given: Any) -> bool:
        found.append(stacking_pays(*given))
        return found[-1]

    step_of(num_layers, width, device, noted)
    return CHOICES[found[-1]]


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, action="append", help=f"repeatable; default: {LAYERS}")
    parser.add_argument("--width", type=int, action="append", help=f"repeatable; default: {WIDTHS}")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shown = table(
        "Microseconds of a plain step of kfac",
        left=["layers", "width"],
        right=[*CHOICES, "ratio"],
        caption="ratio: apart over stacked (* chosen)",
    )
    rows = []
    cases = list(itertools.product(options.layers or LAYERS, options.width or WIDTHS))
    for num, width in track(cases, description="networks", transient=True):
        runs = {
            name: step_of(num, width, options.device, lambda *given, stacks=stacks: bool(stacks))
            for stacks, name in enumerate(CHOICES)
        }
        in_turns(runs, 10, options.device)
        seconds = in_turns(runs, options.repeats, options.device)
        measured = {name: 1e6 * statistics.median(s) for name, s in seconds.items()}
        chosen, ratio = choice(num, width, options.device), measured["apart"] / measured["stacked"]
        rows.append(
            {"layers": num, "width": width, "chosen": chosen, "microseconds": measured, "ratio": ratio}
        )
        cells = [f"{measured[name]:.0f}{'*' if name == chosen else ''}" for name in CHOICES]
        shown.add_row(str(num), str(width), *cells, f"{ratio:.2f}")
    Console().print(shown)
    save({"rows": rows}, options.output / "stack_time.json")


if __name__ == "__main__":
    main()
