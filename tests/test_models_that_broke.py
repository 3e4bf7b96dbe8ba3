"""Models, losses and batches that were once captured wrongly, each against plain PyTorch or dense algebra.

Training is compared with the identity as the method: parameters, buffers and losses must be PyTorch's own.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F

import kfac_fx
import kfac_fx.check
from tests.helpers import batch_factors, factor_reader
from tests.oracles import append_one, reference_factors, relative_error
from tests.training import Batch, Identity, differing, distance, run_plain, run_step, sgd, snapshot, twin

TOLERANCE = 1e-12
Loss = Callable[[Any, Any], Tensor]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def trains_as_plain_pytorch(model: nn.Module, loss_fn: Loss, batches: Sequence[Batch]) -> nn.Module:
    """The trained model, once its losses, parameters and buffers are found to be those of plain PyTorch."""
    plain, ours = twin(model), twin(model)
    expected = run_plain(plain, loss_fn, sgd, batches)
    step = kfac_fx.compile(ours, loss_fn, method=Identity(), optimizer=sgd(ours), backend="eager")
    torch.testing.assert_close(run_step(step, batches), expected, rtol=TOLERANCE, atol=0.0)
    assert distance(snapshot(ours), snapshot(plain)) < TOLERANCE
    assert distance(snapshot(ours), snapshot(model)) > 1e-6, "training changed nothing"
    return ours


# ---------------------------------------------------------------- one module under two names


def shared_linear() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer)


def shared_batch_norm() -> nn.Module:
    norm = nn.BatchNorm1d(3)
    return nn.Sequential(nn.Linear(3, 3), norm, nn.Tanh(), nn.Linear(3, 3), norm)


def shared_block() -> nn.Module:
    block = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3), nn.Tanh()))
    return nn.Sequential(block, nn.Sequential(nn.Linear(3, 3), block), block[0])


SHARED = [shared_linear, shared_batch_norm, shared_block]


@pytest.mark.parametrize("make", SHARED)
def test_inspecting_a_model_with_one_module_under_two_names_leaves_it_as_it_was(
    make: Callable[[], nn.Module],
) -> None:
    model = make().double()
    before, identities = snapshot(model), [id(p) for p in model.parameters()]
    plan = kfac_fx.inspect(model, nn.MSELoss(), randn(5, 3), randn(5, 3))
    assert plan.coverage == 1.0
    assert [id(p) for p in model.parameters()] == identities
    for tensor in (*model.parameters(), *model.buffers()):
        assert not isinstance(tensor, FakeTensor)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert differing(snapshot(model), before) == []


@pytest.mark.parametrize("make", SHARED)
def test_one_module_under_two_names_trains_as_in_plain_pytorch(make: Callable[[], nn.Module]) -> None:
    batches = [(randn(5, 3), randn(5, 3)) for _ in range(4)]
    trains_as_plain_pytorch(make().double(), nn.MSELoss(), batches)


# ---------------------------------------------------------------- strides


class Heads(nn.Module):
    """One matrix per head by einsum: the prediction is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nhti,hik->nhtk", x, self.weight)


class Transposed(nn.Module):
    """A product whose two last axes are swapped in the prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).transpose(1, 2)


class CrossAttention(nn.Module):
    """Attention whose keys and values have another width than its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.attention(x, memory, memory)[0]


STRIDED: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {
    "einsum over heads": lambda: (Heads(), (randn(4, 2, 5, 3), randn(4, 2, 5, 6))),
    "transposed prediction": lambda: (Transposed(), (randn(4, 5, 4), randn(4, 6, 5))),
    "cross-attention": lambda: (CrossAttention(), ((randn(4, 5, 4), randn(4, 6, 3)), randn(4, 5, 4))),
    "transposed targets": lambda: (nn.Linear(4, 6), (randn(4, 5, 4), randn(4, 6, 5).transpose(1, 2))),
}


@pytest.mark.parametrize("loss_fn", [nn.MSELoss(), nn.HuberLoss(delta=0.3)], ids=["squared", "huber"])
@pytest.mark.parametrize("case", STRIDED)
def test_a_prediction_that_is_not_contiguous_trains_as_in_plain_pytorch(case: str, loss_fn: Loss) -> None:
    model, batch = STRIDED[case]()
    trains_as_plain_pytorch(model.double(), loss_fn, [batch] * 3)


def flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()


def image_net() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, stride=2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 3)).double()


def transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


RESTRIDED = [(flat, (8, 3, 4), transposed), (image_net, (8, 3, 5, 5), channels_last)]
RESTRIDED_IDS = ["transposed", "channels_last"]


@pytest.mark.parametrize("other_first", [False, True])
@pytest.mark.parametrize(("make", "shape", "restride"), RESTRIDED, ids=RESTRIDED_IDS)
def test_a_batch_of_other_strides_than_the_captured_one_trains_as_in_plain_pytorch(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    restride: Callable[[Tensor], Tensor],
    other_first: bool,
) -> None:
    batches = [(randn(*shape), torch.randint(3, (8,))) for _ in range(4)]
    changed = [(restride(x) if i % 2 != other_first else x, y) for i, (x, y) in enumerate(batches)]
    assert changed[0][0].stride() != changed[1][0].stride()
    trains_as_plain_pytorch(make(), nn.CrossEntropyLoss(), changed)


@pytest.mark.parametrize(("make", "shape", "restride"), RESTRIDED, ids=RESTRIDED_IDS)
def test_the_factors_of_a_batch_do_not_depend_on_its_strides(
    make: Callable[[], nn.Module], shape: tuple[int, ...], restride: Callable[[Tensor], Tensor]
) -> None:
    model, loss_fn, x, y = make(), nn.CrossEntropyLoss(), randn(*shape), torch.randint(3, (8,))
    read = factor_reader(model, loss_fn, fisher="empirical")
    read(randn(*shape), y)
    found = read(restride(x), y)
    expected = reference_factors(model, loss_fn, x, y, fisher="empirical", sharing="expand")
    for name in expected:
        assert relative_error(found[name]["A"], expected[name]["A"]) < TOLERANCE
        assert relative_error(found[name]["G"], expected[name]["G"]) < TOLERANCE


# ---------------------------------------------------------------- what forward stores


class Counter(nn.Module):
    """A registered buffer that forward assigns anew, and reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        out = self.layer(x) * (1 + 0.1 * self.calls)
        self.mean = 0.9 * self.mean + 0.1 * out.detach().mean(0)
        return out + self.mean


def test_a_buffer_that_forward_assigns_anew_counts_as_in_plain_pytorch() -> None:
    batches = [(randn(6, 4), torch.randint(3, (6,))) for _ in range(3)]
    trained = trains_as_plain_pytorch(Counter().double(), nn.CrossEntropyLoss(), batches)
    assert trained.calls == 3
    assert set(dict(trained.named_buffers())) == {"calls", "mean"}


class Keeper(nn.Module):
    """Keeps its last activation, as models do for a later look."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.activation: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.activation = torch.tanh(self.first(x))
        self.late = self.last(self.activation)
        return self.late


@pytest.mark.parametrize("used", ["inspected", "trained"])
def test_a_model_that_keeps_an_activation_holds_nothing_of_the_trace_and_can_be_copied(used: str) -> None:
    model, x, y = Keeper(), torch.randn(6, 4), torch.randint(3, (6,))
    if used == "inspected":
        kfac_fx.inspect(model, nn.CrossEntropyLoss(), x, y)
    else:
        kfac_fx.compile(model, nn.CrossEntropyLoss(), backend="eager")(x, y)
    held = [value for module in model.modules() for value in vars(module).values()]
    assert not any(isinstance(value, FakeTensor) for value in held)
    other = copy.deepcopy(model)
    assert torch.equal(other(x), model(x))
    assert model.activation is not None and model.activation.shape == (6, 5)


# ---------------------------------------------------------------- axis of the examples


class Recurrent(nn.Module):
    """A time-major recurrent network, [T, N, d], whose last state is classified."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(3, 4, num_layers=2), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][-1])


@pytest.mark.parametrize(("length", "size"), [(6, 4), (4, 7)])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_time_major_recurrent_network_is_matched_with_its_examples_on_the_second_axis(
    kind: type[nn.RNNBase], length: int, size: int
) -> None:
    model, x, y = Recurrent(kind).double(), randn(length, size, 3), torch.randint(5, (size,))
    plan = kfac_fx.inspect(model, nn.CrossEntropyLoss(), x, y)
    assert plan.skipped == () and plan.coverage == 1.0
    assert plan.capture.loss_info.examples == size
    named = dict(model.named_parameters())
    found = torch.autograd.grad(F.cross_entropy(model(x), y), list(named.values()))
    gradients = dict(zip(named, found, strict=True))
    pairs = kfac_fx.check.gradient_pairs(plan)(*(p.detach() for p in model.parameters()), x, y)
    assert len(pairs) == 2 * len(plan.matched)
    for match, autograd, product in zip(plan.matched, pairs[::2], pairs[1::2], strict=True):
        rows = slice(None) if match.part is None else slice(*match.part)
        own = [gradients[name][rows].flatten() for name in (match.weight, match.bias) if name is not None]
        assert relative_error(autograd.flatten().sort().values, torch.cat(own).sort().values) < 1e-10
        assert relative_error(product, autograd) < 1e-10, match.key


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_time_major_batch_gives_the_factors_of_the_same_batch_with_the_examples_first(sharing: str) -> None:
    """Two steps of time make one example of `reduce`, so the axis decides what is averaged."""
    model, size = Recurrent(nn.RNN).double(), 4
    x, y = randn(6, size, 3), torch.randint(5, (size,))
    found = batch_factors(model, F.cross_entropy, x, y, fisher="empirical", sharing=sharing)
    A = found["rnn.weight_ih_l0"]["A"][0]
    rows = append_one(x.transpose(0, 1))
    rows = rows.flatten(0, 1) if sharing == "expand" else rows.mean(1)
    assert relative_error(A, rows.T @ rows / len(rows)) < TOLERANCE
