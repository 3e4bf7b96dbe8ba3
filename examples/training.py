"""The training loop that the examples share: train with a K-FAC method, train with SGD, compare.

Enters a `Task` (a model, a loss and data, with the settings to train them); leaves a table on the terminal.
Both runs start from the same weights, see the same batches in the same order and decay their learning rate
by the same cosine. It must not know any model: what an example is about stays in the example's own file.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import kfac_fx

LossFn = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[Tensor, Tensor], Tensor]
MOMENTUM = 0.9
EVALUATION_BATCH = 500


@final
@dataclass(frozen=True, kw_only=True)
class Split:
    """One part of a data set; the first axis of both tensors counts examples."""

    inputs: Tensor
    targets: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Task:
    """What an example trains, and with which settings.

    data: returns the training and the test split. methods: hyper-parameters of the K-FAC methods tuned for
    this task, by name; a method that is not in it runs with its own defaults.
    """

    name: str
    data: Callable[[], tuple[Split, Split]]
    model: Callable[[], nn.Module]
    loss_fn: LossFn
    batch_size: int
    epochs: int
    lr: float
    sgd_lr: float
    methods: Mapping[str, Any]


@final
@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the final table."""

    method: str
    epochs: int
    steps: int
    seconds: float
    train_loss: float
    test_loss: float
    test_accuracy: float


def split(inputs: Tensor, targets: Tensor, *, num_test: int) -> tuple[Split, Split]:
    """Training and test split of shuffled examples; the shuffle is always the same one."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    test, train = order[:num_test], order[num_test:]
    return (
        Split(inputs=inputs[train], targets=targets[train]),
        Split(inputs=inputs[test], targets=targets[test]),
    )


def loader(data: Split, *, batch_size: int, seed: int) -> DataLoader[tuple[Tensor, ...]]:
    """Shuffled batches that visit every example once an epoch; the last batch may be smaller."""
    examples = TensorDataset(data.inputs, data.targets)
    order = RandomSampler(examples, generator=torch.Generator().manual_seed(seed))
    # The sampler yields whole batches: one indexing operation each, where collating would copy every example.
    return DataLoader(examples, sampler=BatchSampler(order, batch_size, drop_last=False), batch_size=None)


def seeded(model: Callable[[], nn.Module], *, seed: int) -> nn.Module:
    """A new model whose initial weights depend on the seed alone; the global random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model()


def example_batch(task: Task) -> tuple[nn.Module, LossFn, Tensor, Tensor]:
    """What the factory of a `kfac-fx` TARGET returns: model, loss function and one batch."""
    train, _ = task.data()
    batch = slice(0, task.batch_size)
    return seeded(task.model, seed=0), task.loss_fn, train.inputs[batch], train.targets[batch]


def sgd_step(model: nn.Module, loss_fn: LossFn, optimizer: torch.optim.Optimizer) -> Step:
    """The ordinary training step, with the signature of a compiled K-FAC step."""

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@torch.no_grad()
def evaluate(model: nn.Module, loss_fn: LossFn, data: Split) -> tuple[float, float]:
    """Mean loss and accuracy on a split, in evaluation mode; the model's mode is restored."""
    was_training = model.training
    model.eval()
    total_loss, num_correct = 0.0, 0
    batches = zip(data.inputs.split(EVALUATION_BATCH), data.targets.split(EVALUATION_BATCH), strict=True)
    for inputs, targets in batches:
        outputs = model(inputs)
        total_loss += float(loss_fn(outputs, targets)) * targets.numel()
        num_correct += int((outputs.argmax(dim=-1) == targets).sum())
    model.train(was_training)
    return total_loss / data.targets.numel(), num_correct / data.targets.numel()


def fit(
    step: Step,
    optimizer: torch.optim.Optimizer,
    batches: DataLoader[tuple[Tensor, ...]],
    *,
    epochs: int,
    progress: Progress,
    label: str,
) -> int:
    """Train for some epochs under a cosine learning rate; returns the number of steps taken."""
    num_steps = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=num_steps)
    bar = progress.add_task(label, total=num_steps, loss=float("nan"))
    for _ in range(epochs):
        for inputs, targets in batches:
            loss = step(inputs, targets)
            schedule.step()
            progress.update(bar, advance=1, loss=float(loss))
    return num_steps


def run(task: Task, method: str, *, lr: float, epochs: int, seed: int, progress: Progress) -> Result:
    """Train the task once and evaluate it; `method` is `sgd` or the name of a K-FAC method.

    The seconds are those of training, with the capture of the model at the first step.
    """
    train, test = task.data()
    model = seeded(task.model, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM)
    if method == "sgd":
        step: Step = sgd_step(model, task.loss_fn, optimizer)
    else:
        settings = task.methods.get(method, method)
        step = kfac_fx.compile(model, task.loss_fn, method=settings, optimizer=optimizer)
    batches = loader(train, batch_size=task.batch_size, seed=seed)
    start = time.perf_counter()
    steps = fit(step, optimizer, batches, epochs=epochs, progress=progress, label=method)
    seconds = time.perf_counter() - start
    train_loss, _ = evaluate(model, task.loss_fn, train)
    test_loss, test_accuracy = evaluate(model, task.loss_fn, test)
    return Result(
        method=method,
        epochs=epochs,
        steps=steps,
        seconds=seconds,
        train_loss=train_loss,
        test_loss=test_loss,
        test_accuracy=test_accuracy,
    )


def print_results(title: str, results: list[Result], *, console: Console) -> None:
    """The final table, one row a method."""
    table = Table(title=title)
    for heading in ("method", "epochs", "steps", "seconds", "train loss", "test loss", "test accuracy"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in results:
        figures = (f"{row.seconds:.1f}", f"{row.train_loss:.4f}", f"{row.test_loss:.4f}")
        table.add_row(row.method, str(row.epochs), str(row.steps), *figures, f"{row.test_accuracy:.2%}")
    console.print(table)


def parse(task: Task) -> argparse.Namespace:
    """The command line of an example; the task's own settings are the defaults."""
    parser = argparse.ArgumentParser(
        description=f"Train {task.name} with a K-FAC method and with SGD.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--method", choices=kfac_fx.methods(), default="kfac", help="K-FAC method")
    parser.add_argument("--epochs", type=int, default=task.epochs, help="epochs of each run")
    parser.add_argument("--lr", type=float, default=task.lr, help="learning rate of the K-FAC method")
    parser.add_argument("--sgd-lr", type=float, default=task.sgd_lr, help="learning rate of SGD")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the batches")
    return parser.parse_args()


def main(task: Task) -> None:
    """Run an example from the command line: both trainings, then the table."""
    arguments = parse(task)
    torch.manual_seed(arguments.seed)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    results = []
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}"), console=console) as progress:
        for method, lr in ((arguments.method, arguments.lr), ("sgd", arguments.sgd_lr)):
            result = run(task, method, lr=lr, epochs=arguments.epochs, seed=arguments.seed, progress=progress)
            results.append(result)
    print_results(f"{task.name}, seed {arguments.seed}", results, console=console)
