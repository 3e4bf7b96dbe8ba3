"""Time of a training step against SGD's and AdamW's: `python tests/benchmarks/step_time.py`.

Tasks, in float32 (networks of `networks.py`, random data):
    resnet20-32   ResNet-20 of width 32, images 3x32x32, batch 64
    resnet20-16   the same of width 16; also -64, and -32x32 and -32x128 for other batches
    transformer   6 layers, width 256, 128 tokens, batch 16, on bytes
    transformer-words   the same with GPT-2's vocabulary of 50,257; its head is left to the optimizer
Contenders: kfac with statistics at every step and inverses every 10 (transformer: 10 and 100), nkfac as
published (20 and 200), and for the ResNets K-FAC by hooks and im2col (`hooked.py`, statistics at every step,
inverses every 10), the stand-in for today's practice; skfac, if asked for, has kfac's schedule. Measured by
`kfac_fx.bench` as in `kfac-fx bench`: in turns, every contender with a model of its own. "mean", "slowest"
and "median" are of consecutive steps. "amortised" is computed over a period of the schedule from the medians
of its kinds of steps, "of phases" from those of its phases.

    step_time.py                       resnet20-32, resnet20-16, transformer: about 20 minutes on two cores
    step_time.py --task transformer-words --contender kfac --steps 20    about 12 minutes
    step_time.py --period              as many steps as nkfac's period has (200): "slowest" has seen them all
    step_time.py --refresh staggered   inverses spread over the period
    step_time.py --scaling             ResNet-20 of widths 16, 32, 64 and of batches 32, 64, 128; with a plot;
                                       with --contender kfac --steps 2 about 13 minutes

Saves step_time.json (scaling.json, scaling.png) in build/benchmarks. `--threads` is torch's number of threads
(default 2).
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
    ("transformer-words", "kfac"): 1.15,
    ("transformer", "skfac"): 1.15,
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


def tokens(name: str, batch: int, vocabulary: int) -> Task:
    """The transformer on random bytes or words."""
    inputs, targets = torch.randint(vocabulary, (2, batch, 128)).unbind()
    return Task(
        name=name,
        model=small_transformer(vocabulary=vocabulary),
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
    "transformer": lambda name: tokens(name, 16, 256),
    "transformer-words": lambda name: tokens(name, 16, 50257),
    "resnet20-64": lambda name: images(name, 64, 64),
    "resnet20-32x32": lambda name: images(name, 32, 32),
    "resnet20-32x128": lambda name: images(name, 32, 128),
}
CONTENDERS = ("kfac", "nkfac", "skfac", "hooks")
DEFAULT_CONTENDERS = ("kfac", "nkfac", "hooks")
DEFAULT = ("resnet20-32", "resnet20-16", "transformer")
SCALING = {
    "width": {16: "resnet20-16", 32: "resnet20-32", 64: "resnet20-64"},
    "batch": {32: "resnet20-32x32", 64: "resnet20-32", 128: "resnet20-32x128"},
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
    methods = {
        "kfac": kfac_fx.KFAC(**every),
        "nkfac": kfac_fx.NKFAC(),
        "skfac": kfac_fx.SKFAC(**every),
    }
    wanted = options.contender or DEFAULT_CONTENDERS
    hooked = task.hooked and "hooks" in wanted
    extra: dict[str, Make] = {"hooks": lambda model: Hooked(model, task)} if hooked else {}
    return bench(
        task.model,
        task.loss_fn,
        task.inputs,
        task.targets,
        methods=[method for name, method in methods.items() if name in wanted],
        steps=None if options.period else options.steps,
        threads=options.threads,
        backend=options.backend,
        refresh=options.refresh,
        options={"sharing": options.sharing},
        peers=options.peers,
        extra=extra,
        say=say,
    )


def summary(reports: Mapping[str, BenchReport], console: Console) -> None:
    """The table of all tasks: ratios to SGD."""
    shown = table(
        "Training step relative to SGD's",
        left=["task", "contender", "every"],
        right=["mean", "amortised", "of phases", "limit", "slowest / median", "stall", "memory"],
        caption="limit: of the mean; stall: slowest kind of step over the median; memory: peak of a "
        "statistics step, less the state, over that of SGD's step (limit 1.25)",
    )
    for name, report in reports.items():
        for entry in report.contenders:
            ratios, limit = report.ratios(entry), LIMITS.get((name, entry.label))
            memory = report.memory_ratio(entry)
            shown.add_row(
                name,
                entry.label,
                "" if entry.every is None else "{}/{}".format(*entry.every),
                f"{ratios['mean']:.2f}",
                f"{ratios['amortised']:.2f}",
                "" if entry.of_phases is None else f"{entry.of_phases / report.baseline.amortised:.2f}",
                "" if limit is None else f"{limit}",
                f"{entry.slowest / entry.median:.2f}",
                f"{entry.stall:.2f}",
                "" if memory is None else f"{memory:.2f}",
            )
    console.print(shown)


def plot_scaling(reports: Mapping[str, BenchReport], path: Path) -> None:
    """Milliseconds per step by width and by batch."""
    from plots import Panel, save_panels

    panels = []
    for title, tasks in SCALING.items():
        columns = [reports[task] for task in tasks.values()]
        labels = [entry.label for entry in columns[0].contenders]
        times = {label: [1e3 * report.contender(label).amortised for report in columns] for label in labels}
        curves = {label: ([*map(float, tasks)], own) for label, own in times.items()}
        panels.append(Panel(title=f"by {title}", x_label=title, curves=curves, log_x=True, points=True))
    save_panels(panels, y_label="milliseconds per step, amortised", path=path)


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--period", action="store_true", help="as many steps as the longest period has")
    parser.add_argument("--refresh", choices=("together", "staggered"), default="together")
    parser.add_argument("--peers", action="store_true", help="singd and asdfghjkl too, where installed")
    parser.add_argument(
        "--contender", choices=CONTENDERS, action="append", help="next to SGD and AdamW; repeatable"
    )
    parser.add_argument("--sharing", choices=("expand", "reduce"), default="expand")
    parser.add_argument("--scaling", action="store_true", help="widths and batches of ResNet-20")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--task", choices=[*TASKS], action="append", help="repeatable")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.manual_seed(0)
    console, reports = Console(width=160), {}
    scaling = dict.fromkeys(name for tasks in SCALING.values() for name in tasks.values())
    for name in scaling if options.scaling else options.task or DEFAULT:
        with torch.device(options.device):
            task = TASKS[name](name)
        with console.status(name) as status:
            reports[name] = measure(task, options, lambda text, name=name: status.update(f"{name}: {text}"))
        show(reports[name], console)
    summary(reports, console)
    tasks = {name: json.loads(to_json(report)) for name, report in reports.items()}
    limits = {" ".join(key): value for key, value in LIMITS.items()}
    file = options.output / ("scaling.json" if options.scaling else "step_time.json")
    save({"limits": limits, "tasks": tasks}, file)
    if options.scaling:
        plot_scaling(reports, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
