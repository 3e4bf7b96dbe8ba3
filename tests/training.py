"""Small training runs for the system tests: the identity as a method, plain PyTorch as the reference.

Enters: model factories and batches. Leaves: losses and a snapshot of everything that a run may change.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import kfac_fx
from kfac_fx.batch import call_model
from kfac_fx.contracts import Statistics
from kfac_fx.types import FactorSpec, LayerMatch, Refreshed, State

Batch = tuple[Any, Tensor]
Losses = list[Tensor]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class Identity:
    """K-FAC with its statistics and inverses, but the direction is the gradient itself."""

    inner: kfac_fx.KFAC = field(default_factory=lambda: kfac_fx.KFAC(statistics_every=3, inverse_every=7))
    name: str = "identity"

    @property
    def statistics_every(self) -> int:
        return self.inner.statistics_every

    @property
    def inverse_every(self) -> int:
        return self.inner.inverse_every

    @property
    def shared_names(self) -> frozenset[str]:
        return self.inner.shared_names

    @property
    def growing_names(self) -> frozenset[str]:
        return self.inner.growing_names

    @property
    def max_factor_dim(self) -> int:
        return self.inner.max_factor_dim

    def base_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return self.inner.base_optimizer(parameters)

    def refuses(self, match: LayerMatch) -> str | None:
        return self.inner.refuses(match)

    def init(self, match: LayerMatch, *, dtype: torch.dtype, device: torch.device) -> State:
        return self.inner.init(match, dtype=dtype, device=device)

    def statistics_names(self, match: LayerMatch) -> tuple[str, ...]:
        return self.inner.statistics_names(match)

    def batch_statistics(self, statistics: Statistics, names: Sequence[str], state: State) -> State:
        return self.inner.batch_statistics(statistics, names, state)

    def join(self, name: str, first: Tensor, second: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        return self.inner.join(name, first, second, weights)

    def mean_over(self, match: LayerMatch, name: str) -> int:
        return self.inner.mean_over(match, name)

    def fold(self, state: State, batch: State, *, weight: Tensor, inverse_scale: Tensor) -> State:
        return self.inner.fold(state, batch, weight=weight, inverse_scale=inverse_scale)

    def new_weight(self, count: int) -> float:
        return self.inner.new_weight(count)

    def refresh(
        self, states: Mapping[str, State], *, counts: Mapping[str, int]
    ) -> tuple[dict[str, State], Refreshed]:
        return self.inner.refresh(states, counts=counts)

    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        return gradient

    def rescale(
        self, directions: list[Tensor], gradients: list[Tensor], *, learning_rates: Tensor
    ) -> list[Tensor]:
        return directions

    def factors(self, match: LayerMatch, *, dtype: torch.dtype) -> tuple[FactorSpec, ...]:
        return self.inner.factors(match, dtype=dtype)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The usual first choice."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Adaptive, with decoupled weight decay."""
    return torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.1)


def plain_step(model: nn.Module, loss_fn: Any, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    """One step of plain PyTorch."""
    loss = loss_fn(call_model(model, batch[0]), batch[1])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def run_plain(
    model: nn.Module, loss_fn: Any, make: MakeOptimizer, batches: Sequence[Batch], *, seed: int = 0
) -> Losses:
    """Losses of plain PyTorch over the batches; the model is trained in place."""
    optimizer = make(model)
    torch.manual_seed(seed)
    return [plain_step(model, loss_fn, optimizer, batch) for batch in batches]


def run_step(step: kfac_fx.TrainStep, batches: Sequence[Batch], *, seed: int = 0) -> Losses:
    """Losses of a compiled step over the batches."""
    torch.manual_seed(seed)
    return [step(inputs, targets) for inputs, targets in batches]


def snapshot(model: nn.Module, step: kfac_fx.TrainStep | None = None) -> dict[str, Tensor]:
    """Copies of every tensor a step may change, by name: parameters, buffers, optimizer state, curvature."""
    tensors = dict(model.state_dict())
    if step is not None:
        tensors.update(_flat("state", step.state_dict()))
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _flat(prefix: str, value: Any) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {prefix: value}
    if isinstance(value, Mapping):
        value = list(value.items())
    elif isinstance(value, (list, tuple)):
        value = list(enumerate(value))
    else:
        return {prefix: torch.tensor(float(value))} if isinstance(value, (int, float)) else {}
    found: dict[str, Tensor] = {}
    for key, item in value:
        found.update(_flat(f"{prefix}.{key}", item))
    return found


def differing(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> list[str]:
    """Names whose tensors are not bit for bit the same; names that only one side has count."""
    names = sorted({*left, *right})
    return [n for n in names if n not in left or n not in right or not torch.equal(left[n], right[n])]


def distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Largest relative Frobenius distance over the tensors of two snapshots; NaN where one has a NaN."""
    assert set(left) == set(right)
    pairs = [(left[name].double(), right[name].double()) for name in left]
    return float(torch.stack([(a - b).norm() / b.norm().clamp(min=1e-12) for a, b in pairs]).max())


def twin(model: nn.Module) -> nn.Module:
    """An independent copy."""
    return copy.deepcopy(model)
