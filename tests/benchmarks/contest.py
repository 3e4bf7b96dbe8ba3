"""Training runs that the benchmarks of methods share: who trains, on what, and one run with its clock.

Enters a contender (a method or a first-order optimizer) with a learning rate and a seed; leaves a `Trial`:
the loss of the whole training set every ten steps, and the seconds until then. It chooses and compares
nothing.

The task is the example `examples/mnist_resnet.py` made small enough for hundreds of runs on one core: its
data and its residual block, but a stem with stride 2 and two blocks, of 16 and 32 channels. For one seed all
contenders start from the same weights and see the same batches; the learning rate is constant.

Every method keeps its published settings and base optimizer, but for the tuned learning rate and the
schedule, which is scaled to runs of a few hundred steps: statistics every 5 steps and a refresh every 20.
Published are 20 and 200 (NKFAC), 100 and 1000 (AdaNKFAC), 10 and 100 (EKFAC), 834 (SKFAC: longer than a run,
here every 20 steps from the one batch of the refresh) and statistics every 10 (SINGD).

Seconds are processor time of one thread, since other programs disturb a wall clock. Evaluation does not
count, nor does tracing: the first step of each kind (plain, with statistics, with a refresh) traces or warms
up, and counts as much as the median of the later ones of its kind.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import kfac_fx
from kfac_fx.errors import NonFiniteLossError
from kfac_fx.methods import METHODS

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from mnist_resnet import Block  # noqa: E402
from mnist_resnet import mnist as mnist  # noqa: E402
from training import Split as Split  # noqa: E402
from training import Step, evaluate, loader, seeded, sgd_step  # noqa: E402

BATCH_SIZE = 100
EVALUATE_EVERY = 10
SCHEDULE = {"statistics_every": 5, "inverse_every": 20}
SCHEDULE_OF = {"skfac": {"statistics_every": 20, "inverse_every": 20}}
FIRST_ORDER = ("sgd", "adamw", "muon")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"kfac-unclipped": ("kfac", {"kl_clip": None})}
LOSS_FN = nn.CrossEntropyLoss()
LRS = (0.001, 0.003, 0.01, 0.03, 0.1)
LARGE_LRS = (0.01, 0.03, 0.1, 0.3, 1.0)
LARGE = ("sgd", "nkfac", "foof", "ikfac", "singd")


@final
class SmallResNet(nn.Module):
    """A stem, two residual blocks with BatchNorm and a linear head: 18,626 parameters."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Block(8, 16, stride=2), Block(16, 32, stride=2))
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10] of images [N, 1, 28, 28]."""
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A contender with its learning rate. damping: of the method, None for its default or without one."""

    contender: str
    lr: float
    damping: float | None = None


@final
@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run: the training loss and the seconds after each of `steps`; infinite where it diverged."""

    setting: Setting
    seed: int
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    test_accuracy: float

    def first(self, loss: float) -> int | None:
        """Index of the first evaluation at or below a loss."""
        return next((i for i, value in enumerate(self.losses) if value <= loss), None)

    @property
    def final_loss(self) -> float:
        """Loss at the last evaluation."""
        return self.losses[-1]

    @property
    def settled_loss(self) -> float:
        """Median of the last three evaluations, which BatchNorm's running averages make noisy."""
        return math.inf if math.isinf(self.losses[-1]) else statistics.median(self.losses[-3:])


@final
class Muon:
    """torch.optim.Muon for the weights, as matrices [d_out, rest], and AdamW for scales, shifts and biases.

    Muon takes matrices alone: a convolution's weight is given to it as a matrix that shares the memory. Both
    parts have one learning rate; Muon's is matched to AdamW's step length.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, lr: float) -> None:
        self.weights = [p for p in parameters if p.dim() > 1]
        self.matrices = [nn.Parameter(p.detach().view(p.shape[0], -1)) for p in self.weights]
        others = [p for p in parameters if p.dim() <= 1]
        muon = torch.optim.Muon(self.matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.parts = (muon, torch.optim.AdamW(others, lr=lr, weight_decay=0.0))

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for part in self.parts:
            part.zero_grad()
        for weight in self.weights:
            weight.grad = None

    def step(self) -> None:
        """One update of all parameters."""
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.reshape(matrix.shape)
        for part in self.parts:
            part.step()


def contenders() -> tuple[str, ...]:
    """Every method of the library, its variants, and the first-order optimizers that this torch has."""
    known = FIRST_ORDER if hasattr(torch.optim, "Muon") else FIRST_ORDER[:2]
    return (*METHODS, *VARIANTS, *known)


def lr_grid(contender: str, *, quick: bool = False) -> tuple[float, ...]:
    """The learning rates that a contender is tuned over, as many for each; the second and fourth if quick."""
    return (LARGE_LRS if contender in LARGE else LRS)[1 if quick else 0 :: 2 if quick else 1]


def make_method(setting: Setting) -> Any:
    """The method with its published settings, the schedule of this task and the damping that is asked for."""
    name, changes = VARIANTS.get(setting.contender, (setting.contender, {}))
    schedule = SCHEDULE_OF.get(name, SCHEDULE)
    method = METHODS[name]()
    if not method.inverse_every:
        schedule = {**schedule, "inverse_every": 0}
    method = replace(method, **schedule, **changes)
    return method if setting.damping is None else replace(method, damping=setting.damping)


def make_step(setting: Setting, model: nn.Module) -> tuple[Step, tuple[int, int]]:
    """The training step, and every how many steps it takes statistics and refreshes (0: never)."""
    parameters = list(model.parameters())
    if setting.contender not in FIRST_ORDER:
        method = make_method(setting)
        optimizer = method.base_optimizer(parameters)
        for group in optimizer.param_groups:
            group["lr"] = setting.lr
        step = kfac_fx.compile(model, LOSS_FN, method=method, optimizer=optimizer)
        return step, (method.statistics_every, method.inverse_every)
    makers: dict[str, Callable[[], Any]] = {
        "sgd": lambda: torch.optim.SGD(parameters, lr=setting.lr, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(parameters, lr=setting.lr),
        "muon": lambda: Muon(parameters, lr=setting.lr),
    }
    return sgd_step(model, LOSS_FN, makers[setting.contender]()), (0, 0)


def endless(batches: DataLoader[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """Epoch after epoch, each in an order of its own."""
    while True:
        yield from batches


def kind_of(count: int, every: tuple[int, int]) -> str:
    """What the step after `count` others does besides the update."""
    if every[1] and count % every[1] == 0:
        return "refresh"
    return "statistics" if every[0] and count % every[0] == 0 else "plain"


def without_tracing(seconds: Sequence[float], kinds: Sequence[str]) -> list[float]:
    """The seconds of every step, where the first of each kind counts as the median of the later ones."""
    cleaned = list(seconds)
    for kind in set(kinds):
        first, *later = [i for i, own in enumerate(kinds) if own == kind]
        if later:
            cleaned[first] = statistics.median(seconds[i] for i in later)
    return cleaned


def run(
    setting: Setting, *, seed: int, num_steps: int, data: tuple[Split, Split], until: float = 0.0
) -> Trial:
    """Train for some steps, or until the training loss is at most `until`, or until the run diverges."""
    train, test = data
    model = seeded(SmallResNet, seed=seed)
    step, every = make_step(setting, model)
    batches = endless(loader(train, batch_size=BATCH_SIZE, seed=seed))
    steps, losses, seconds, kinds = [], [], [], []
    for count in range(num_steps):
        inputs, targets = next(batches)
        kinds.append(kind_of(count, every))
        start = time.process_time()
        finite = advance(step, inputs, targets)
        seconds.append(time.process_time() - start)
        if finite and (count + 1) % EVALUATE_EVERY and count + 1 < num_steps:
            continue
        loss = evaluate(model, LOSS_FN, train)[0] if finite else math.nan
        steps.append(count + 1)
        losses.append(loss if math.isfinite(loss) else math.inf)
        if losses[-1] <= until or math.isinf(losses[-1]):
            break
    cleaned = without_tracing(seconds, kinds)
    return Trial(
        setting=setting,
        seed=seed,
        steps=tuple(steps),
        losses=tuple(losses),
        seconds=tuple(sum(cleaned[:count]) for count in steps),
        test_accuracy=math.nan if math.isinf(losses[-1]) else evaluate(model, LOSS_FN, test)[1],
    )


def advance(step: Step, inputs: Tensor, targets: Tensor) -> bool:
    """One step; whether its loss was finite."""
    try:
        return bool(torch.isfinite(step(inputs, targets)))
    except NonFiniteLossError:
        return False
