"""Every method against SGD, AdamW and Muon on MNIST: `python tests/benchmarks/methods_table.py`.

Network, data, schedules and the clock are those of `contest.py`. Each contender trains on seeds 0 and 1 with
each of five learning rates, half a decade apart; the one with the fewest steps to the training loss, both
seeds together, is chosen (without one that gets there twice, that with the smallest last losses). The table
shows three other seeds, 10, 11 and 12, which had no part in the choice: medians of the steps and seconds to
the loss, of the loss after the last step and of the test accuracy there. A contender that misses the loss on
most seeds is "not reached". A learning rate at an end of its grid is marked: a wider grid might serve better.

SGD has momentum 0.9, AdamW torch's weight decay of 0.01. "kfac-unclipped" is K-FAC without the KL clip, which
otherwise bounds the steps of kfac, kfc, ekfac and diagonal however large the learning rate is.

Saves build/benchmarks/methods_table.json and .png (training loss against steps and against seconds).
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from contest import SCHEDULE, SCHEDULE_OF, Setting, Split, Trial, contenders, lr_grid, mnist, run
from plots import Panel, save_panels
from records import OUTPUT, save, table
from rich.console import Console
from rich.progress import Progress

TUNING_SEEDS = (0, 1)
FIRST_SEED = 10
LOSS = 0.05
NUM_STEPS = 400
NUM_SEEDS = 3
QUICK: dict[str, Any] = {"loss": 0.5, "num_steps": 60, "num_seeds": 1}


@final
@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is measured: the training loss to reach, the length of a run, and the number of reported seeds."""

    loss: float = LOSS
    num_steps: int = NUM_STEPS
    num_seeds: int = NUM_SEEDS
    quick: bool = False

    @property
    def seeds(self) -> range:
        """The reported seeds."""
        return range(FIRST_SEED, FIRST_SEED + self.num_seeds)

    @property
    def tuning_seeds(self) -> tuple[int, ...]:
        """The seeds that choose the learning rate."""
        return TUNING_SEEDS[:1] if self.quick else TUNING_SEEDS

    def lrs(self, contender: str) -> tuple[float, ...]:
        """The learning rates to tune over."""
        return lr_grid(contender, quick=self.quick)


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender: medians over the seeds; infinite where most seeds did not reach the loss.

    at_end: the learning rate is the smallest or largest of its grid. milliseconds: of a step, on average.
    """

    contender: str
    lr: float
    at_end: bool
    reached: int
    steps: tuple[float, ...]
    median_steps: float
    median_seconds: float
    milliseconds: float
    final_loss: float
    test_accuracy: float


def rank(trials: Sequence[Trial], loss: float) -> tuple[float, float]:
    """Order of learning rates: steps to the loss over all tuning seeds, then the last losses."""
    firsts = [trial.first(loss) for trial in trials]
    steps = (math.inf if i is None else t.steps[i] for i, t in zip(firsts, trials, strict=True))
    return sum(steps), sum(trial.final_loss for trial in trials)


def summary(contender: str, best: Setting, trials: Sequence[Trial], protocol: Protocol) -> Row:
    """The table's row of a contender from its reported runs."""
    firsts = [trial.first(protocol.loss) for trial in trials]
    steps = tuple(math.inf if i is None else t.steps[i] for i, t in zip(firsts, trials, strict=True))
    seconds = [math.inf if i is None else t.seconds[i] for i, t in zip(firsts, trials, strict=True)]
    lrs = lr_grid(contender)
    return Row(
        contender=contender,
        lr=best.lr,
        at_end=best.lr in (lrs[0], lrs[-1]),
        reached=sum(math.isfinite(count) for count in steps),
        steps=steps,
        median_steps=statistics.median(steps),
        median_seconds=statistics.median(seconds),
        milliseconds=1e3 * statistics.median(t.seconds[-1] / t.steps[-1] for t in trials),
        final_loss=statistics.median(t.final_loss for t in trials),
        test_accuracy=statistics.median(t.test_accuracy for t in trials),
    )


def contend(
    contender: str, protocol: Protocol, data: tuple[Split, Split], progress: Progress
) -> tuple[Row, list[Trial], list[Trial]]:
    """Tune a contender, then run it on the reported seeds: its row, the tuning runs and the reported ones."""
    lrs, seeds = protocol.lrs(contender), protocol.tuning_seeds
    bar = progress.add_task(contender, total=len(lrs) * len(seeds) + protocol.num_seeds)
    tuning: dict[Setting, list[Trial]] = {Setting(contender=contender, lr=lr): [] for lr in lrs}
    for setting, own in tuning.items():
        for seed in seeds:
            trial = run(setting, seed=seed, num_steps=protocol.num_steps, data=data, until=protocol.loss)
            own.append(trial)
            progress.advance(bar)
    best = min(tuning, key=lambda setting: rank(tuning[setting], protocol.loss))
    trials = []
    for seed in protocol.seeds:
        trials.append(run(best, seed=seed, num_steps=protocol.num_steps, data=data))
        progress.advance(bar)
    tried = [trial for own in tuning.values() for trial in own]
    return summary(contender, best, trials, protocol), tried, trials


def print_rows(rows: Sequence[Row], protocol: Protocol, console: Console) -> None:
    """The table, fastest first; seconds also as multiples of SGD's."""
    figures = table(
        f"To training loss {protocol.loss:g}: MNIST, small ResNet, {protocol.num_seeds} seed(s), "
        f"{protocol.num_steps} steps",
        left=("method",),
        right=("lr", "steps", "range", "seconds", "/ SGD", "ms", "last loss", "test"),
        caption="* at an end of its grid. / SGD: seconds as a multiple of SGD's. ms: of an average step.",
    )
    sgd = next((row.median_seconds for row in rows if row.contender == "sgd"), math.inf)
    for row in rows:
        reached = math.isfinite(row.median_steps)
        relative = f"{row.median_seconds / sgd:.2f}" if reached and math.isfinite(sgd) else ""
        figures.add_row(
            row.contender,
            f"{row.lr:g}{'*' if row.at_end else ' '}",
            f"{row.median_steps:g}" if reached else "not reached",
            f"{min(row.steps):g}-{max(row.steps):g}" if reached else f"{row.reached} of {len(row.steps)}",
            f"{row.median_seconds:.2f}" if reached else "",
            relative,
            f"{row.milliseconds:.1f}",
            f"{row.final_loss:.4f}",
            f"{100 * row.test_accuracy:.1f}%",
        )
    console.print(figures)


def median_curve(trials: Sequence[Trial], x: str) -> tuple[list[float], list[float]]:
    """Median over the seeds of (steps or seconds, loss) at each evaluation that all seeds reached."""
    length = min(len(trial.steps) for trial in trials)
    xs = [statistics.median(getattr(t, x)[i] for t in trials) for i in range(length)]
    return xs, [statistics.median(t.losses[i] for t in trials) for i in range(length)]


def plot(trials: dict[str, list[Trial]], protocol: Protocol, path: Path) -> None:
    """Training loss against steps and against seconds."""
    panels = [
        Panel(
            title=f"against {x}",
            x_label=x,
            curves={name: median_curve(own, x) for name, own in trials.items()},
            levels=(protocol.loss,),
            ceiling=5.0,
        )
        for x in ("steps", "seconds")
    ]
    save_panels(panels, y_label="training loss, median of the seeds", path=path)


def record(
    protocol: Protocol, rows: Sequence[Row], tuning: Sequence[Trial], trials: dict[str, list[Trial]]
) -> dict[str, Any]:
    """What the JSON file holds."""
    return {
        "protocol": {
            **asdict(protocol),
            "tuning_seeds": TUNING_SEEDS,
            "first_seed": FIRST_SEED,
            "schedule": SCHEDULE,
            "schedule_of": SCHEDULE_OF,
            "lrs": {row.contender: protocol.lrs(row.contender) for row in rows},
        },
        "table": [asdict(row) for row in rows],
        "tuning": [asdict(trial) for trial in tuning],
        "trials": [asdict(trial) for own in trials.values() for trial in own],
    }


def main() -> None:
    """Tune and run all contenders on one thread, print the table, save record and plot."""
    parser = argparse.ArgumentParser(description="Steps and seconds to a training loss, all methods.")
    parser.add_argument("--methods", help="comma-separated names (default: all and the first-order ones)")
    parser.add_argument("--quick", action="store_true", help="2 learning rates, 1 seed, 60 steps")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"folder to write to (default {OUTPUT})")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    protocol = Protocol(**QUICK, quick=True) if arguments.quick else Protocol()
    names = arguments.methods.split(",") if arguments.methods else contenders()
    data = mnist()
    console = Console()
    rows, tuning, trials = [], [], {}
    with Progress(console=console, transient=True) as progress:
        for name in names:
            row, tuned, trials[name] = contend(name, protocol, data, progress)
            rows.append(row)
            tuning += tuned
    rows.sort(key=lambda row: (row.median_steps, row.final_loss))
    print_rows(rows, protocol, console)
    save(record(protocol, rows, tuning, trials), arguments.output / "methods_table.json")
    plot(trials, protocol, arguments.output / "methods_table.png")
    console.print(f"saved {arguments.output}/methods_table.json and .png")


if __name__ == "__main__":
    main()
