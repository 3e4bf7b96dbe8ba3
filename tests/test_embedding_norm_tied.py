"""Embeddings, scale-and-shift of normalisations and weights used twice (oracles B1 to B3 and EMB2)."""

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
from tests.equivalents import Branches
from tests.helpers import batch_factors, gradients, one_step
from tests.oracles import (
    kronecker_block,
    parameters_ggn,
    reference_factors,
    relative_error,
    weight_ggn,
)

pytestmark = pytest.mark.usefixtures("equal_models_share_a_capture")

VOCABULARY, WIDTH, CLASSES = 7, 3, 2
TOLERANCE = 1e-10


class Words(nn.Module):
    """Class of a sentence: embedding, mean over the words, tanh, linear head."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=padding_idx)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).mean(1).tanh())


class OneHot(nn.Module):
    """The same function with the embedding as a linear layer over one-hot rows."""

    def __init__(self, words: Words) -> None:
        super().__init__()
        self.embedding = nn.Linear(VOCABULARY, WIDTH, bias=False).double()
        self.embedding.weight.data.copy_(words.embedding.weight.T)
        self.head = words.head

    def forward(self, tokens: Tensor) -> Tensor:
        rows = nn.functional.one_hot(tokens, VOCABULARY).to(self.embedding.weight.dtype)
        return self.head(self.embedding(rows).mean(1).tanh())


def sentences() -> tuple[Tensor, Tensor]:
    """Five sentences of six words; the last word of the vocabulary never occurs."""
    torch.manual_seed(0)
    return torch.randint(VOCABULARY - 1, (5, 6)), torch.randint(CLASSES, (5,))


@pytest.mark.parametrize("fisher", ["type2", "empirical"])
def test_b1_embedding_factors_are_word_frequencies_and_those_of_one_hot_rows(fisher: str) -> None:
    tokens, y = sentences()
    words = Words().double()
    loss_fn, name = nn.CrossEntropyLoss(), "embedding.weight"
    state = batch_factors(words, loss_fn, tokens, y, fisher=fisher, sharing="expand")[name]
    dense = batch_factors(OneHot(words), loss_fn, tokens, y, fisher=fisher, sharing="expand")[name]
    wanted = reference_factors(words, loss_fn, tokens, y, fisher=fisher, sharing="expand")[name]
    counts = torch.bincount(tokens.flatten(), minlength=VOCABULARY).double()
    assert torch.equal(state["A"], counts / tokens.numel())
    assert relative_error(torch.diag(state["A"])[None], wanted["A"]) < TOLERANCE
    assert relative_error(torch.diag(state["A"])[None], dense["A"]) < TOLERANCE
    assert relative_error(state["G"], wanted["G"]) < TOLERANCE
    assert relative_error(state["G"], dense["G"]) < TOLERANCE


@pytest.mark.parametrize(("rule", "fisher"), [("factored", "type2"), ("sqrt", "empirical")])
def test_emb2_row_formula_equals_the_dense_solve(rule: str, fisher: str) -> None:
    tokens, y = sentences()
    words, loss_fn = Words().double(), nn.CrossEntropyLoss()
    method = kfac_fx.KFAC(damping=1e-2, kl_clip=None, damping_rule=rule)
    result = one_step(words, loss_fn, tokens, y, method=method, fisher=fisher)
    state, change = result.curvature["embedding.weight"], result.change["embedding.weight"]
    A, G = torch.diag(state["A"]), state["G"][0]
    pi = ((A.trace() / VOCABULARY) / (G.trace() / WIDTH)).sqrt()
    ratio = pi if rule == "factored" else torch.ones_like(pi)
    A_damped = A + 0.1 * ratio * torch.eye(VOCABULARY, dtype=torch.float64)
    G_damped = G + 0.1 / ratio * torch.eye(WIDTH, dtype=torch.float64)
    gradient = gradients(words, loss_fn, tokens, y)["embedding.weight"]
    block = torch.kron(A_damped, G_damped)
    dense = torch.linalg.solve(block, gradient.flatten()).view_as(gradient)
    assert relative_error(change, -dense) < TOLERANCE
    assert torch.equal(change[-1], torch.zeros(WIDTH, dtype=torch.float64))


def test_padding_word_is_not_counted_and_not_updated() -> None:
    tokens, y = sentences()
    words, loss_fn = Words(padding_idx=2).double(), nn.CrossEntropyLoss()
    assert (tokens == 2).any()
    result = one_step(words, loss_fn, tokens, y, method=kfac_fx.KFAC(), fisher="empirical")
    frequencies = result.curvature["embedding.weight"]["A"]
    counts = torch.bincount(tokens[tokens != 2], minlength=VOCABULARY).double()
    assert relative_error(frequencies / frequencies.sum(), counts / counts.sum()) < TOLERANCE
    assert torch.equal(result.change["embedding.weight"][2], torch.zeros(WIDTH, dtype=torch.float64))


ROWS = {
    "layer norm": lambda: [nn.Linear(6, 6), nn.LayerNorm(6)],
    "layer norm without shift": lambda: [nn.Linear(6, 5), nn.LayerNorm(5, bias=False)],
    "rms norm": lambda: [nn.Linear(6, 6), nn.RMSNorm(6)],
    "batch norm": lambda: [nn.Linear(6, 5), nn.BatchNorm1d(5)],
    "group norm": lambda: [nn.Linear(6, 6), nn.GroupNorm(3, 6)],
}
IMAGES = {
    "batch norm": lambda: [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)],
    "batch norm in eval mode": lambda: [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4).eval()],
    "group norm": lambda: [nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4)],
    "layer norm of whole images": lambda: [nn.Conv2d(2, 2, 3), nn.LayerNorm((2, 2, 2))],
}
TOKENS = {
    "layer norm": lambda: [nn.Linear(4, 4), nn.LayerNorm(4)],
    "rms norm": lambda: [nn.Linear(4, 3), nn.RMSNorm(3)],
}
NORMS = {"rows": (ROWS, (6,)), "images": (IMAGES, (2, 4, 4)), "tokens": (TOKENS, (3, 4))}


def assert_unit_blocks_are_exact(kind: str, loss_fn: nn.Module, *, sharing: str) -> None:
    """F of every norm against the sub-blocks of (scale_c, shift_c) of the exact matrix."""
    torch.manual_seed(2)
    builders, shape = NORMS[kind]
    x = torch.randn(6, *shape, dtype=torch.float64)
    model = Branches([nn.Sequential(*build()).double() for build in builders.values()], x)
    outputs = model(x)
    squared = isinstance(loss_fn, nn.MSELoss)
    y = torch.randn_like(outputs) if squared else torch.randint(outputs.shape[1], (6,))
    norms = {f"layers.{index}.1": layer[1] for index, layer in enumerate(model.layers)}
    with torch.no_grad():
        for parameter in [p for norm in norms.values() for p in norm.parameters()]:
            parameter.add_(0.3 * torch.randn_like(parameter))
    curvature = batch_factors(model, loss_fn, x, y, fisher="type2", sharing=sharing)
    for name, norm in norms.items():
        names = [f"{name}.{kind}" for kind, _ in norm.named_parameters()]
        whole, channels = parameters_ggn(model, loss_fn, x, y, names), norm.weight.numel()
        exact = torch.stack([whole[c::channels, c::channels] for c in range(channels)])
        assert relative_error(curvature[f"{name}.weight"]["F"], exact) < TOLERANCE, norm


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), nn.MSELoss(reduction="sum")], ids=["mean", "sum"])
@pytest.mark.parametrize("kind", NORMS)
def test_b2_unit_blocks_of_norms_are_exact_for_any_network(kind: str, loss_fn: nn.Module) -> None:
    """One loss term per example (reduce): positions of an example add up before products are taken."""
    assert_unit_blocks_are_exact(kind, loss_fn, sharing="reduce")


def test_b2_rows_without_positions_have_the_same_blocks_for_expand() -> None:
    assert_unit_blocks_are_exact("rows", nn.CrossEntropyLoss(), sharing="expand")


class SplitConcat(nn.Module):
    """One weight applied to both halves of the input; every output depends on one of the two uses."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.shared = nn.Linear(3, 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        return torch.cat([self.shared(left), self.shared(right)], dim=1)


class Chain(nn.Module):
    """One square weight applied twice in a row."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.shared(x))


class TiedConvolution(nn.Module):
    """One convolution applied to two images of different size, each pooled into outputs of its own."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.shared = nn.Conv1d(1, 2, 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.shared(x[:, None, :2]), self.shared(x[:, None, 2:])
        return torch.cat([left.flatten(1), right.flatten(1)], dim=1)


def tied_errors(model: nn.Module, reduction: str) -> float:
    x, loss_fn = torch.randn(8, 6, dtype=torch.float64), nn.MSELoss(reduction=reduction)
    y = torch.randn_like(model(x))
    state = batch_factors(model, loss_fn, x, y, fisher="type2", sharing="expand")["shared.weight"]
    wanted = reference_factors(model, loss_fn, x, y, fisher="type2", sharing="expand")["shared.weight"]
    assert relative_error(state["A"], wanted["A"]) < TOLERANCE
    assert relative_error(state["G"], wanted["G"]) < TOLERANCE
    bias = None if model.shared.bias is None else "shared.bias"
    exact = weight_ggn(model, loss_fn, x, y, "shared.weight", bias)
    return relative_error(kronecker_block(state["A"], state["G"]), exact)


@pytest.mark.parametrize(("reduction", "bias"), [("mean", True), ("sum", False)])
@pytest.mark.parametrize("kind", [SplitConcat, TiedConvolution])
def test_b3_uses_of_one_weight_with_separate_losses_are_exact(
    kind: type[nn.Module], reduction: str, bias: bool
) -> None:
    torch.manual_seed(3)
    assert tied_errors(kind(bias=bias).double(), reduction) < TOLERANCE


@pytest.mark.parametrize("bias", [True, False])
def test_b3_a_weight_applied_to_its_own_output_is_not_exact(bias: bool) -> None:
    torch.manual_seed(4)
    assert tied_errors(Chain(bias=bias).double(), "mean") > 1e-1
