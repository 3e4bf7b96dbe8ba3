"""The training of `digits_conv.py` with live figures in TensorBoard: `python examples/digits_tensorboard.py`.

Then `tensorboard --logdir build/tensorboard`: losses, damping, KL, times, and of every layer's A and G
condition, effective rank and how far the stored inverse has fallen behind.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

import digits_conv
import kfac_fx
from training import MOMENTUM, loader, seeded


def train(folder: Path, *, epochs: int, every: int, method: str = "kfac", seed: int = 0) -> dict[str, float]:
    """Train, writing `step.report().scalars()` every few steps; returns the last ones.

    A report computes the eigenvalues of all factors, so it should be rarer than steps.
    """
    task = digits_conv.TASK
    train_split, _ = task.data()
    model = seeded(task.model, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr, momentum=MOMENTUM)
    settings = task.methods.get(method, method)
    step = kfac_fx.compile(model, task.loss_fn, method=settings, optimizer=optimizer)
    batches = loader(train_split, batch_size=task.batch_size, seed=seed)
    num_steps, scalars = 0, {}
    with SummaryWriter(folder) as writer:
        for _ in range(epochs):
            for inputs, targets in batches:
                step(inputs, targets)
                num_steps += 1
                if num_steps % every == 0:
                    scalars = step.report().scalars()
                    for name, value in scalars.items():
                        writer.add_scalar(name, value, global_step=num_steps)
    print(step.report())
    return scalars


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/tensorboard"), help="of the event files")
    parser.add_argument("--method", choices=kfac_fx.methods(), default="kfac", help="K-FAC method")
    parser.add_argument("--epochs", type=int, default=5, help="epochs to train")
    parser.add_argument("--every", type=int, default=10, help="steps between two reports")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    train(arguments.folder, epochs=arguments.epochs, every=arguments.every, method=arguments.method)
    print(f"\nsaved {arguments.folder}: tensorboard --logdir {arguments.folder}")


if __name__ == "__main__":
    main()
