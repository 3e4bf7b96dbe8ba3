"""Time of a training step against SGD's and AdamW's: `python tests/benchmarks/step_time.py`.

Tasks, in float32 (networks of `networks.py`, random data):
    resnet20-32   ResNet-20 of width 32, images 3x32x32, batch 64
    resnet20-16   the same of width 16
    transformer   6 layers, width 256, 128 tokens, batch 16
Contenders: kfac with statistics at every step and inverses every 10 (transformer: 10 and 100), nkfac as
published (20 and 200), and for the ResNets K-FAC by hooks and im2col (`hooked.py`, statistics at every step,
inverses every 10), the stand-in for today's practice. Measured by `kfac_fx.bench` as in `kfac-fx bench`: in
turns, every contender with a model of its own. "amortised" is computed over a period of the schedule from the
medians of its kinds of steps; the other figures are of consecutive steps.

Saves build/benchmarks/step_time.json. `--threads` is torch's number of threads (default 2). About 15 minutes
on two cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from hooked import HookedKFAC
from networks import next_token_loss, resnet20, small_transformer
from records import OUTPUT, save, table
from rich.console import Console
from torch import Tensor, nn

import kfac_fx
from kfac_fx.bench import BenchReport, Make, bench, kinds_of, show, to_json

LEARNING_RATE = 1e-6
LIMITS = {
    ("resnet20-32", "kfac"): 2.0,
    ("resnet20-16", "kfac"): 2.2,
    ("resnet20-32", "nkfac"): 1.15,
    ("resnet20-16", "nkfac"): 1.15,
    ("transformer", "kfac"): 1.15,
}
Loss = Callable[[Tensor, Tensor], Tensor]


@final
@dataclass(frozen=True, kw_only=True)
class Task:
    """A model with a batch, the schedule of kfac, and whether the hooks know its layers."""

    name: str
    model: nn.Module
    loss_fn: Loss
    inputs: Tensor
    targets: Tensor
    statistics_every: int = 1
    inverse_every: int = 10
    hooked: bool = True


def images(name: str, width: int, batch: int) -> Task:
    """ResNet-20 on random images."""
    inputs, targets = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    return Task(
        name=name,
        model=resnet20(width=width),
        loss_fn=nn.CrossEntropyLoss(),
        inputs=inputs,
        targets=targets,
    )


def tokens(name: str, batch: int) -> Task:
    """The transformer on random bytes."""
    inputs, targets = torch.randint(256, (2, batch, 128)).unbind()
    return Task(
        name=name,
        model=small_transformer(),
        loss_fn=next_token_loss,
        inputs=inputs,
        targets=targets,
        statistics_every=10,
        inverse_every=100,
        hooked=False,
    )


TASKS: Mapping[str, Callable[[str], Task]] = {
    "resnet20-32": lambda name: images(name, 32, 64),
    "resnet20-16": lambda name: images(name, 16, 64),
    "transformer": lambda name: tokens(name, 16),
}


@final
class Hooked:
    """Training with `HookedKFAC` as a contender of `kfac_fx.bench`."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        self._model, self._task = model, task
        self._optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
        self._kfac = HookedKFAC(model)
        self.every: tuple[int, int] | None = (task.statistics_every, task.inverse_every)
        self.kinds: Mapping[str, Sequence[int]] = kinds_of(self._due, task.inverse_every)
        self.run(0)

    def _due(self, index: int) -> tuple[bool, bool]:
        return index % self._task.statistics_every == 0, index % self._task.inverse_every == 0

    def run(self, index: int) -> None:
        """One step."""
        self._kfac.collects, refreshes = self._due(index)
        self._task.loss_fn(self._model(self._task.inputs), self._task.targets).backward()
        if refreshes:
            self._kfac.refresh()
        self._kfac.precondition(LEARNING_RATE)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def parts(self) -> Mapping[str, Callable[[], Any]]:
        """None: the hooks run inside forward and backward."""
        return {}

    def tensors(self) -> Iterable[Tensor]:
        """The model's, momentum, factors and inverses."""
        momentum = [t for state in self._optimizer.state.values() for t in state.values()]
        inverses = [inverse for pair in self._kfac.inverses.values() for inverse in pair]
        factors = [*self._kfac.A.values(), *self._kfac.G.values()]
        tensors = [*self._model.parameters(), *self._model.buffers(), *momentum, *factors, *inverses]
        return [t for t in tensors if isinstance(t, Tensor)]


def measure(task: Task, options: argparse.Namespace, say: Callable[[str], Any]) -> BenchReport:
    """The report of one task."""
    every = {"statistics_every": task.statistics_every, "inverse_every": task.inverse_every}
    extra: dict[str, Make] = {"hooks": lambda model: Hooked(model, task)} if task.hooked else {}
    return bench(
        task.model,
        task.loss_fn,
        task.inputs,
        task.targets,
        methods=[kfac_fx.KFAC(**every), kfac_fx.NKFAC()],
        steps=options.steps,
        threads=options.threads,
        backend=options.backend,
        extra=extra,
        say=say,
    )


def summary(reports: Mapping[str, BenchReport], console: Console) -> None:
    """The table of all tasks: ratios to SGD."""
    shown = table(
        "Training step relative to SGD's",
        left=["task", "contender", "every"],
        right=["mean", "amortised", "limit", "slowest / median", "stall", "step MiB", "of SGD's"],
        caption="limit: of the amortised ratio; slowest / median: of consecutive steps; stall: of kinds",
    )
    for name, report in reports.items():
        for entry in report.contenders:
            ratios, limit = report.ratios(entry), LIMITS.get((name, entry.label))
            memory, sgd = entry.memory, report.baseline.memory
            shown.add_row(
                name,
                entry.label,
                "" if entry.every is None else "{}/{}".format(*entry.every),
                f"{ratios['mean']:.2f}",
                f"{ratios['amortised']:.2f}",
                "" if limit is None else f"{limit}",
                f"{entry.slowest / entry.median:.2f}",
                f"{entry.stall:.2f}",
                "" if memory is None else f"{max(memory.peaks.values()) / 2**20:.0f}",
                "" if memory is None or sgd is None else _growth(memory.peaks, sgd.peaks),
            )
    console.print(shown)


def _growth(peaks: Mapping[str, int], base: Mapping[str, int]) -> str:
    return f"{max(peaks.values()) / max(base.values()):.2f}"


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--task", choices=[*TASKS], action="append", help="default: all")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.manual_seed(0)
    console, reports = Console(width=160), {}
    for name in options.task or TASKS:
        with torch.device(options.device):
            task = TASKS[name](name)
        with console.status(name) as status:
            reports[name] = measure(task, options, lambda text, name=name: status.update(f"{name}: {text}"))
        show(reports[name], console)
    summary(reports, console)
    tasks = {name: json.loads(to_json(report)) for name, report in reports.items()}
    save(
        {"limits": {" ".join(key): value for key, value in LIMITS.items()}, "tasks": tasks},
        options.output / "step_time.json",
    )


if __name__ == "__main__":
    main()
