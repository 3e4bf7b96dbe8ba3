"""Bytes of state that the plan announces against the storages that a running step holds, for every method."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fx
from kfac_fx.methods import METHODS
from kfac_fx.report.rows import totals

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

CLASSES, STEPS = 4, 2


class Experts(nn.Module):
    """Batched linear layers by bmm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(3, 6, 9) / 3), nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.bmm(x.expand(3, -1, -1), self.weight).tanh().mean(0))


class SharedInput(nn.Module):
    """q, k and v read one tensor; k has no bias, so that its A is another one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8, bias=False), nn.Linear(6, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return self.head(mixed).mean(1)


class Transformer(nn.Module):
    """One block with norms; the head is the token embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(13, 8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 8))
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        y = self.norm(x)
        x = x + self.out(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        return self.head(x + self.mlp(x)).flatten(0, 1)


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 3, 3, bias=False),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(32, 4)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions with norms": (conv_net, (2, 8, 8)),
    "grouped convolutions": (grouped, (4, 6, 6)),
    "experts": (Experts, (6,)),
    "shared input": (SharedInput, (5, 6)),
    "tied transformer": (Transformer, ()),
}
VARIANTS: dict[str, Any] = {
    "kfac, eigenvectors": kfac_fx.KFAC(damping_rule="tikhonov"),
    "kfc, by channel": kfac_fx.KFC(spatially_uncorrelated_activations=True),
    "skfac, window of 3": kfac_fx.SKFAC(window=3),
    "skfac, subsampled": kfac_fx.SKFAC(strategy="subsample", positions=2),
    "skfac, receptive fields": kfac_fx.SKFAC(strategy="receptive_field"),
    "singd, no momentum": kfac_fx.SINGD(alpha1=0.0),
}
CASES = [
    *((name, cls(), case) for name, cls in METHODS.items() for case in MODELS),
    *((name, method, "grouped convolutions") for name, method in VARIANTS.items()),
    *((name, method, "shared input") for name, method in VARIANTS.items()),
]


def batch_of(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if shape:
        return torch.randn(4, *shape, dtype=dtype), torch.randint(CLASSES, (4,))
    return torch.randint(13, (4, 5)), torch.randint(13, (20,))


def allocated(tensors: dict[str, dict[str, Tensor]]) -> int:
    """Bytes of all storages behind the tensors, each once: also what lies beside a view counts."""
    storages = [tensor.untyped_storage() for state in tensors.values() for tensor in state.values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def running(method: Any, case: str, dtype: torch.dtype = torch.float32) -> kfac_fx.TrainStep:
    """A step after a few batches, all phases of which have run."""
    build, shape = MODELS[case]
    model = build().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    step = kfac_fx.compile(model, F.cross_entropy, method=method, optimizer=optimizer, backend="eager")
    for _ in range(STEPS):
        step(*batch_of(shape, dtype))
    return step


@pytest.mark.parametrize(("method", "case"), [pytest.param(m, c, id=f"{n}-{c}") for n, m, c in CASES])
def test_the_plan_announces_the_bytes_that_are_held(method: Any, case: str) -> None:
    step = running(method, case)
    announced = sum(factor.bytes for factor in step.plan.factors)
    assert announced == allocated(step.state_dict()["curvature"]) > 0
    assert announced == totals(step.plan).cost.state_bytes


@pytest.mark.parametrize("name", METHODS)
def test_float64_models_hold_twice_as_much(name: str) -> None:
    wide = running(METHODS[name](), "convolutions with norms", torch.float64)
    narrow = running(METHODS[name](), "convolutions with norms")
    announced = sum(factor.bytes for factor in wide.plan.factors)
    assert announced == allocated(wide.state_dict()["curvature"])
    assert announced == 2 * sum(factor.bytes for factor in narrow.plan.factors)


def test_the_count_sees_a_tensor_that_is_shared_and_one_that_is_a_view() -> None:
    whole = torch.zeros(10)
    assert allocated({"a": {"A": whole}, "b": {"A": whole}}) == 40
    assert allocated({"a": {"A": whole[:2]}}) == 40, "a view keeps all of its storage"
    assert allocated({"a": {"A": whole}, "b": {"A": whole.clone()}}) == 80


def test_a_shared_input_is_held_once_by_methods_that_share_it() -> None:
    """q and v read the same rows with a bias: one A of 7 x 7; K-FAC's inverses follow G and are two."""
    factors = {(f.owner, f.side): f for f in running(kfac_fx.KFAC(), "shared input").plan.factors}
    a = 4 * 7 * 7
    assert factors["q.weight", "A"].bytes == 2 * a and factors["v.weight", "A"].bytes == a
    assert factors["k.weight", "A"].bytes == 2 * 4 * 6 * 6
    shared = {(f.owner, f.side): f for f in running(kfac_fx.FOOF(), "shared input").plan.factors}
    assert shared["q.weight", "A"].bytes == 2 * a and shared["v.weight", "A"].bytes == 0
    separate = {(f.owner, f.side): f for f in running(kfac_fx.SINGD(), "shared input").plan.factors}
    assert separate["v.weight", "A"].bytes == 2 * a == separate["q.weight", "A"].bytes
