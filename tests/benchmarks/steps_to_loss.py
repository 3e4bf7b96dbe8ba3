"""Steps to a training loss on digits, K-FAC against tuned SGD: `python tests/benchmarks/steps_to_loss.py`.

Every setting of both grids trains the network of `examples/digits_conv.py` once a seed. For one seed all of
them start from the same weights and see the same batches. The loss of the whole training set is evaluated
every four steps; the steps to a loss are those at the first evaluation at or below it. For each loss a method
is represented by the setting with the smallest median over the seeds, so both are tuned for each loss anew.
A run that did not get there within its limit counts as infinitely many steps.

Batch size, momentum, KL clip, decay and grid of K-FAC were chosen in pilot runs on seeds 0 and 1 (about 200
settings, against 15 of SGD); the default seeds 10, 11 and 12 had no part in that.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import contest
import torch
from records import save, table
from rich.console import Console
from rich.progress import track
from torch import nn

import kfac_fx

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from digits_conv import TASK  # noqa: E402
from training import Split, Step, evaluate, loader, seeded, sgd_step  # noqa: E402

LOSSES = (0.1, 0.03, 0.01, 0.003)
BATCH_SIZE = 256
EVALUATE_EVERY = 4
STEP_LIMIT = {"sgd": 300, "kfac": 100}
SGD_LRS = {0.9: tuple(2.0**-k for k in range(8, -1, -1)), 0.8: tuple(2.0**-k for k in range(5, -1, -1))}
KFAC_LRS = (0.025, 0.05, 0.1)
KFAC_DAMPINGS = (0.001, 0.003)
KFAC_MOMENTUM = 0.5
KFAC_FIXED: dict[str, Any] = {"kl_clip": 1e-2, "decay": 0.9, "inverse_every": 1}


@final
@dataclass(frozen=True, kw_only=True)
class Setting(contest.Setting):
    """One point of a grid."""

    momentum: float


@final
@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run. steps, seconds: per loss of LOSSES, infinite if it was not reached; training time only."""

    setting: Setting
    seed: int
    steps: tuple[float, ...]
    seconds: tuple[float, ...]
    final_loss: float


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """The best setting of one contender for one loss."""

    loss: float
    contender: str
    setting: Setting
    median_steps: float
    steps: tuple[float, ...]
    median_seconds: float


SGD_GRID = tuple(Setting(contender="sgd", lr=lr, momentum=m) for m, lrs in SGD_LRS.items() for lr in lrs)
KFAC_GRID = tuple(
    Setting(contender="kfac", lr=lr, momentum=KFAC_MOMENTUM, damping=damping)
    for lr in KFAC_LRS
    for damping in KFAC_DAMPINGS
)
CONTENDERS = {
    "SGD-0.9": tuple(setting for setting in SGD_GRID if setting.momentum == 0.9),
    "SGD-tuned": SGD_GRID,
    "K-FAC": KFAC_GRID,
}


def make_step(setting: Setting, model: nn.Module) -> Step:
    """The training step of a setting."""
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.lr, momentum=setting.momentum)
    if setting.damping is None:
        return sgd_step(model, TASK.loss_fn, optimizer)
    method = kfac_fx.KFAC(damping=setting.damping, **KFAC_FIXED)
    return kfac_fx.compile(model, TASK.loss_fn, method=method, optimizer=optimizer)


def run(setting: Setting, *, seed: int, train: Split) -> Trial:
    """Train until the smallest loss is reached, the run diverges or its limit is met."""
    model = seeded(TASK.model, seed=seed)
    step = make_step(setting, model)
    batches = contest.endless(loader(train, batch_size=BATCH_SIZE, seed=seed))
    steps, seconds = [math.inf] * len(LOSSES), [math.inf] * len(LOSSES)
    elapsed, loss = 0.0, math.inf
    for count in range(1, STEP_LIMIT[setting.contender] + 1):
        inputs, targets = next(batches)
        start = time.perf_counter()
        if not contest.advance(step, inputs, targets):
            loss = math.inf
            break
        elapsed += time.perf_counter() - start
        if count % EVALUATE_EVERY:
            continue
        loss, _ = evaluate(model, TASK.loss_fn, train)
        for i, target in enumerate(LOSSES):
            if loss <= target and math.isinf(steps[i]):
                steps[i], seconds[i] = count, elapsed
        if loss <= min(LOSSES) or not math.isfinite(loss):
            break
    return Trial(setting=setting, seed=seed, steps=tuple(steps), seconds=tuple(seconds), final_loss=loss)


def best(trials: Sequence[Trial], contender: str, loss: float) -> Row:
    """The contender's setting with the smallest median of steps to a loss; ties go to fewer seconds."""
    index = LOSSES.index(loss)
    rows = []
    for setting in CONTENDERS[contender]:
        own = [trial for trial in trials if trial.setting == setting]
        steps = tuple(trial.steps[index] for trial in own)
        seconds = statistics.median(trial.seconds[index] for trial in own)
        rows.append(
            Row(
                loss=loss,
                contender=contender,
                setting=setting,
                median_steps=statistics.median(steps),
                steps=steps,
                median_seconds=seconds,
            )
        )
    return min(rows, key=lambda row: (row.median_steps, row.median_seconds))


def ratio(row: Row, kfac: Row) -> str:
    """How many times more steps than K-FAC; a lower bound where only K-FAC got there."""
    if math.isinf(kfac.median_steps):
        return "none"
    if math.isinf(row.median_steps):
        return f"> {STEP_LIMIT['sgd'] / kfac.median_steps:.1f}"
    return f"{row.median_steps / kfac.median_steps:.1f}"


def print_rows(rows: Sequence[Row], *, num_seeds: int, console: Console) -> None:
    """For every loss, the best setting of each contender and its steps: median and range over the seeds."""
    best_ones = table(
        f"Steps to a training loss, digits, batch {BATCH_SIZE}, {num_seeds} seeds",
        left=("loss", "method"),
        right=("lr", "momentum", "damping", "steps", "range", "seconds", "ratio"),
        caption="SGD-0.9: learning rate tuned. SGD-tuned: learning rate and momentum tuned.",
    )
    kfac = {row.loss: row for row in rows if row.contender == "K-FAC"}
    for row in rows:
        setting = row.setting
        damping = "" if setting.damping is None else f"{setting.damping:g}"
        settings = (f"{setting.lr:.3g}", f"{setting.momentum:g}", damping)
        steps = (f"{row.median_steps:g}", f"{min(row.steps):g}-{max(row.steps):g}")
        figures = (*settings, *steps, f"{row.median_seconds:.2f}", ratio(row, kfac[row.loss]))
        best_ones.add_row(f"{row.loss:g}", row.contender, *figures, end_section=row.contender == "K-FAC")
    console.print(best_ones)


def record(trials: Sequence[Trial], rows: Sequence[Row]) -> dict[str, Any]:
    """What `--output` saves: the protocol, every run and the table."""
    protocol = {
        "losses": LOSSES,
        "batch_size": BATCH_SIZE,
        "evaluate_every": EVALUATE_EVERY,
        "step_limit": STEP_LIMIT,
        "sgd_lrs_of_momentum": SGD_LRS,
        "kfac": {"lr": KFAC_LRS, "damping": KFAC_DAMPINGS, "momentum": KFAC_MOMENTUM, **KFAC_FIXED},
    }
    return {
        "protocol": protocol,
        "table": [asdict(row) for row in rows],
        "trials": [asdict(trial) for trial in trials],
    }


def main() -> None:
    """Run both grids on one thread, print the table, save the record."""
    parser = argparse.ArgumentParser(description="Steps to a training loss: K-FAC against tuned SGD.")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    parser.add_argument("--first-seed", type=int, default=10, help="first of the seeds (default 10)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train, _ = TASK.data()
    console = Console()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    jobs = [(setting, seed) for setting in KFAC_GRID + SGD_GRID for seed in seeds]
    trials = [
        run(setting, seed=seed, train=train) for setting, seed in track(jobs, "training", console=console)
    ]
    rows = [best(trials, contender, loss) for loss in LOSSES for contender in CONTENDERS]
    print_rows(rows, num_seeds=arguments.seeds, console=console)
    if arguments.output:
        save(record(trials, rows), arguments.output)
        console.print(f"saved {arguments.output}")


if __name__ == "__main__":
    main()
