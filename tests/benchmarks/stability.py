"""How much NKFAC depends on learning rate and damping: `python tests/benchmarks/stability.py`.

NKFAC's paper claims that it trains well over wide ranges of both. Here the training loss after 100 steps of
the task of `contest.py` is measured at seven learning rates that span a factor of 30, and at seven dampings
that span a factor of 30, each range centred on the contender's own tuned value; median of the seeds 10, 11
and 12. Beside NKFAC stand K-FAC, K-FAC without its KL clip (the clip alone makes K-FAC's steps independent of
any learning rate that is large enough), and for the learning rate SGD.

Tuning is on seeds 0 and 1, by the mean loss: the learning rate over the five values of `contest.py` at the
published damping, then the damping over five values half a decade apart around the published one. The loss of
a run is the median of its last three evaluations, ten steps apart; that of a run that diverges is infinite.

Saves build/benchmarks/stability.json and .png.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from contest import FIRST_ORDER, Setting, Split, Trial, lr_grid, make_method, mnist, run
from plots import Panel, save_panels
from records import OUTPUT, save, table
from rich.console import Console
from rich.progress import Progress

CONTENDERS = ("nkfac", "kfac", "kfac-unclipped", "sgd")
TUNING_SEEDS = (0, 1)
FIRST_SEED = 10
RANGE = 30.0
DAMPING_FACTORS = tuple(10.0 ** (k / 2) for k in range(-2, 3))
CEILING = 3.0
QUICK: dict[str, Any] = {"num_steps": 40, "num_points": 3, "num_seeds": 1, "quick": True}
Data = tuple[Split, Split]


@final
@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is measured: the length of a run, the points of a range and the number of reported seeds."""

    num_steps: int = 100
    num_points: int = 7
    num_seeds: int = 3
    quick: bool = False

    @property
    def factors(self) -> tuple[float, ...]:
        """Multiples of the tuned value: from 1 / sqrt(30) to sqrt(30), evenly on a logarithmic scale."""
        last = self.num_points - 1
        return tuple(RANGE ** (k / last - 0.5) for k in range(self.num_points))


@final
@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Losses of one contender over a range of one setting, medians over the seeds.

    axis: "lr" or "damping". centre: the tuned setting.
    """

    contender: str
    axis: str
    centre: Setting
    values: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def spread(self) -> float:
        """Largest loss of the range divided by the smallest."""
        return max(self.losses) / min(self.losses)


def tuned(contender: str, protocol: Protocol, data: Data, progress: Progress) -> tuple[Setting, list[Trial]]:
    """The learning rate, then the damping, with the smallest loss on the tuning seeds; and all runs."""
    seeds, label = TUNING_SEEDS[: protocol.num_seeds], f"{contender}: tuning"
    settings = [Setting(contender=contender, lr=lr) for lr in lr_grid(contender, quick=protocol.quick)]
    trials = measure(settings, seeds, protocol, data, progress, label)
    best = min(settings, key=lambda setting: statistics.fmean(losses_of(setting, trials)))
    if contender in FIRST_ORDER:
        return best, trials
    published = make_method(best).damping
    factors = DAMPING_FACTORS[:: 2 if protocol.quick else 1]
    settings = [replace(best, damping=published * factor) for factor in factors]
    found = measure(settings, seeds, protocol, data, progress, label)
    best = min(settings, key=lambda setting: statistics.fmean(losses_of(setting, found)))
    return best, trials + found


def losses_of(setting: Setting, trials: Sequence[Trial]) -> list[float]:
    """Losses of one setting, over the seeds."""
    return [trial.settled_loss for trial in trials if trial.setting == setting]


def measure(
    settings: Sequence[Setting],
    seeds: Sequence[int],
    protocol: Protocol,
    data: Data,
    progress: Progress,
    label: str,
) -> list[Trial]:
    """One run per setting and seed."""
    jobs = [(setting, seed) for setting in settings for seed in seeds]
    return [
        run(setting, seed=seed, num_steps=protocol.num_steps, data=data)
        for setting, seed in progress.track(jobs, description=label)
    ]


def sweep(
    axis: str, centre: Setting, protocol: Protocol, data: Data, progress: Progress
) -> tuple[Sweep, list[Trial]]:
    """Losses over the range of one setting around its tuned value."""
    values = tuple(getattr(centre, axis) * factor for factor in protocol.factors)
    settings = [replace(centre, **{axis: value}) for value in values]
    seeds = range(FIRST_SEED, FIRST_SEED + protocol.num_seeds)
    trials = measure(settings, seeds, protocol, data, progress, f"{centre.contender}: {axis}")
    losses = tuple(statistics.median(losses_of(setting, trials)) for setting in settings)
    own = Sweep(contender=centre.contender, axis=axis, centre=centre, values=values, losses=losses)
    return own, trials


def print_sweeps(sweeps: Sequence[Sweep], protocol: Protocol, console: Console) -> None:
    """One row per contender and setting: the loss at each multiple of the tuned value."""
    figures = table(
        f"Training loss after {protocol.num_steps} steps over a {RANGE:g}x range, "
        f"median of {protocol.num_seeds} seed(s)",
        left=("method", "of", "tuned"),
        right=(*(f"x{factor:.2g}" for factor in protocol.factors), "spread"),
        caption="columns: multiple of the tuned value. spread: largest loss divided by smallest.",
    )
    for own in sorted(sweeps, key=lambda own: own.axis, reverse=True):
        losses = ("diverged" if math.isinf(loss) else f"{loss:.3f}" for loss in own.losses)
        tuned_value = f"{getattr(own.centre, own.axis):.3g}"
        figures.add_row(own.contender, own.axis, tuned_value, *losses, f"{own.spread:.1f}")
    console.print(figures)


def plot(sweeps: Sequence[Sweep], protocol: Protocol, path: Path) -> None:
    """Loss against the multiple of the tuned value, one panel for each setting."""
    titles = {"lr": "learning rate", "damping": "damping"}
    panels = [
        Panel(
            title=title,
            x_label=f"{title} as a multiple of the tuned one",
            curves={own.contender: (protocol.factors, own.losses) for own in sweeps if own.axis == axis},
            log_x=True,
            points=True,
            ceiling=CEILING,
        )
        for axis, title in titles.items()
    ]
    save_panels(panels, y_label=f"training loss after {protocol.num_steps} steps", path=path)


def record(protocol: Protocol, sweeps: Sequence[Sweep], trials: Sequence[Trial]) -> dict[str, Any]:
    """What the JSON file holds."""
    return {
        "protocol": {**asdict(protocol), "tuning_seeds": TUNING_SEEDS, "first_seed": FIRST_SEED},
        "sweeps": [{**asdict(own), "spread": own.spread} for own in sweeps],
        "trials": [{**asdict(trial), "settled_loss": trial.settled_loss} for trial in trials],
    }


def main() -> None:
    """Tune and sweep on one thread, print the table, save record and plot."""
    parser = argparse.ArgumentParser(description="Training loss over ranges of learning rate and damping.")
    parser.add_argument("--methods", default=",".join(CONTENDERS), help="comma-separated names")
    parser.add_argument("--quick", action="store_true", help="3 points, 1 seed, 40 steps")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"folder to write to (default {OUTPUT})")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    protocol = Protocol(**QUICK) if arguments.quick else Protocol()
    data = mnist()
    console = Console()
    sweeps, trials = [], []
    with Progress(console=console, transient=True) as progress:
        for contender in arguments.methods.split(","):
            centre, tuning = tuned(contender, protocol, data, progress)
            trials += tuning
            for axis in ("lr",) if centre.damping is None else ("lr", "damping"):
                own, runs = sweep(axis, centre, protocol, data, progress)
                sweeps.append(own)
                trials += runs
    print_sweeps(sweeps, protocol, console)
    save(record(protocol, sweeps, trials), arguments.output / "stability.json")
    plot(sweeps, protocol, arguments.output / "stability.png")
    console.print(f"saved {arguments.output}/stability.json and .png")


if __name__ == "__main__":
    main()
