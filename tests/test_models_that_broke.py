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
from tests.oracles import append_one, record_uses, reference_factors, relative_error
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


@pytest.mark.parametrize(("length", "size"), [(4, 3), (3, 5)])
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
    """`reduce` averages over time within an example, so the axis of the examples decides."""
    model, size = Recurrent(nn.RNN).double(), 4
    x, y = randn(3, size, 3), torch.randint(5, (size,))
    found = batch_factors(model, F.cross_entropy, x, y, fisher="empirical", sharing=sharing)
    A = found["rnn.weight_ih_l0"]["A"][0]
    rows = append_one(x.transpose(0, 1))
    rows = rows.flatten(0, 1) if sharing == "expand" else rows.mean(1)
    assert relative_error(A, rows.T @ rows / len(rows)) < TOLERANCE


# ---------------------------------------------------------------- ignored and selected targets


class MaskedLanguageModel(nn.Module):
    """Attention over all tokens, then layers that work on each position alone; joint or separate q, k, v."""

    def __init__(self, joint: bool) -> None:
        super().__init__()
        self.tokens, self.up, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.qkv = nn.ModuleList([nn.Linear(4, 12)] if joint else [nn.Linear(4, 4) for _ in range(3)])

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.tokens(tokens)
        parts = torch.cat([layer(hidden) for layer in self.qkv], -1).chunk(3, -1)
        hidden = hidden + F.scaled_dot_product_attention(*parts)
        return self.head(hidden + torch.tanh(self.up(hidden))).transpose(1, 2)


@pytest.mark.parametrize("fisher", ["empirical", "type2"])
@pytest.mark.parametrize("joint", [True, False], ids=["joint qkv", "separate q, k, v"])
def test_ignored_positions_that_attention_reads_stay_in_a(joint: bool, fisher: str) -> None:
    """A row counts if its cotangent, in some layer that reads it, is not entirely zero."""
    model, tokens = MaskedLanguageModel(joint).double(), torch.randint(7, (3, 4))
    labels = torch.full((3, 4), -100)
    labels[0, 1], labels[0, 3], labels[1, 2] = 2, 0, 1  # the third sequence is ignored entirely
    outputs, uses = record_uses(model, tokens)
    loss = F.cross_entropy(outputs, labels)
    readers = [use for name in uses if name.startswith("qkv") for use in uses[name]]
    cotangents = torch.autograd.grad(loss, [use.output for use in readers])
    read = torch.stack([(g != 0).any(-1) for g in cotangents]).any(0)
    labelled = labels != -100
    assert labelled.sum() < read.sum() < read.numel()
    found = batch_factors(model, F.cross_entropy, tokens, labels, fisher=fisher, sharing="expand")
    for name in uses:
        if name != "tokens.weight":
            rows = uses[name][0].rows[:, 0][read if name.startswith("qkv") else labelled]
            assert relative_error(found[name]["A"][0], rows.T @ rows / len(rows)) < TOLERANCE, name


class EncoderDecoder(nn.Module):
    """The decoder's tokens see a mean over the encoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, both: Tensor) -> Tensor:
        source, target = both.unbind(1)
        memory = torch.tanh(self.encoder(source)).mean(1, keepdim=True)
        return self.decoder(target + memory).transpose(1, 2)


def test_an_encoder_as_long_as_the_decoder_is_not_masked_by_the_decoders_labels() -> None:
    model, x, labels = EncoderDecoder().double(), randn(5, 2, 6, 4), torch.randint(3, (5, 6))
    labels[:, 3:] = -100
    found = batch_factors(model, F.cross_entropy, x, labels, fisher="empirical", sharing="expand")
    _, uses = record_uses(model, x)
    for name, kept in (("encoder.weight", labels > -200), ("decoder.weight", labels >= 0)):
        rows = uses[name][0].rows[:, 0][kept].detach()
        assert relative_error(found[name]["A"][0], rows.T @ rows / len(rows)) < TOLERANCE, name


def selected(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs[targets >= 0], targets[targets >= 0])


def labels_without(*ignored: int) -> Tensor:
    return torch.randint(3, (8,)).index_fill(0, torch.tensor(ignored), -1)


def test_a_loss_on_selected_rows_trains_as_in_plain_pytorch_while_the_selection_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    selections = [(0, 1, 2), (5,), (0, 2, 3, 4, 5, 6, 7), (1, 6)]
    trains_as_plain_pytorch(model, selected, [(randn(8, 4), labels_without(*some)) for some in selections])


def test_the_empirical_factor_of_a_loss_on_selected_rows_counts_the_selected_ones() -> None:
    model, x = nn.Linear(4, 3).double(), randn(8, 4)
    read = factor_reader(model, selected, fisher="empirical")
    for labels in (labels_without(0, 1, 2), labels_without(4)):
        outputs = model(x)
        (g,) = torch.autograd.grad(selected(outputs, labels), outputs)
        assert relative_error(read(x, labels)["weight"]["G"][0], g.T @ g * (labels >= 0).sum()) < TOLERANCE


def test_class_weights_with_an_ignored_index_that_is_no_class() -> None:
    """The loss is PyTorch's; R_ is one over the weights of the terms that are kept."""
    weight = torch.rand(5, dtype=torch.float64)
    loss_fn = nn.CrossEntropyLoss(weight=weight, ignore_index=255)
    model, x, y = nn.Linear(4, 5).double(), randn(8, 4), torch.tensor([0, 255, 3, 4, 1, 255, 2, 2])
    outputs = model(x)
    loss = loss_fn(outputs, y)
    (g,) = torch.autograd.grad(loss, outputs, retain_graph=True)
    step = kfac_fx.compile(model, loss_fn, optimizer=sgd(model), backend="eager")
    expected = reference_factors(model, loss_fn, x, y, fisher="type2", sharing="expand")[".weight"]["G"]
    exact = batch_factors(model, loss_fn, x, y, fisher="type2", sharing="expand")["weight"]["G"]
    assert relative_error(exact, expected) < TOLERANCE
    torch.testing.assert_close(step(x, y), loss.detach(), rtol=TOLERANCE, atol=0.0)
    G = step.state_dict()["curvature"]["weight"]["G"][0]
    assert relative_error(G, g.T @ g * weight[y[y != 255]].sum()) < TOLERANCE


def test_squared_error_with_swapped_arguments_has_the_same_exact_factors() -> None:
    model, x, t = (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(),
        randn(6, 4),
        randn(6, 3),
    )

    def swapped(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(targets, outputs)

    expected = reference_factors(model, nn.MSELoss(), x, t, fisher="type2", sharing="expand")
    found = batch_factors(model, swapped, x, t, fisher="type2", sharing="expand")
    for name in expected:
        assert relative_error(found[name]["A"], expected[name]["A"]) < TOLERANCE
        assert relative_error(found[name]["G"], expected[name]["G"]) < TOLERANCE
