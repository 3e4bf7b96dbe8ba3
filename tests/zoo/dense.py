"""Models made of fully connected layers, in every spelling, with every way to pass a batch.

Each factory returns one `Example`; each model is the smallest that shows its point: a layer used twice, a
tied weight, a frozen parameter, a reparametrised weight, inputs by position or by keyword.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from .example import Example, by_name, classes


def mlp() -> Example:
    """Three linear layers, the last without a bias."""
    model = nn.Sequential(
        nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 5, bias=False)
    )
    return Example(model, nn.CrossEntropyLoss(), torch.randn(5, 12), classes(5, count=5))


class ReusedLayer(nn.Module):
    """A deep network that applies one square layer twice."""

    def __init__(self) -> None:
        """Build the three layers."""
        super().__init__()
        self.first = nn.Linear(10, 16)
        self.shared = nn.Linear(16, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        hidden = torch.tanh(self.first(x))
        hidden = torch.tanh(self.shared(hidden))
        return self.last(torch.tanh(self.shared(hidden)))


def reused_layer() -> Example:
    """A deep network whose middle layer runs twice."""
    return Example(ReusedLayer(), nn.CrossEntropyLoss(), torch.randn(4, 10), classes(4, count=4))


class TiedAutoencoder(nn.Module):
    """The decoder multiplies by the transpose of the encoder's weight."""

    def __init__(self) -> None:
        """Build the shared weight and both biases."""
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 20) / 20**0.5)
        self.encoder_bias = nn.Parameter(torch.zeros(8))
        self.decoder_bias = nn.Parameter(torch.zeros(20))

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of x."""
        hidden = torch.tanh(F.linear(x, self.weight, self.encoder_bias))
        return F.linear(hidden, self.weight.t(), self.decoder_bias)


def tied_autoencoder() -> Example:
    """An autoencoder with tied weights and squared error."""
    x = torch.randn(5, 20)
    return Example(TiedAutoencoder(), nn.MSELoss(), x, x.clone())


class FunctionalLinear(nn.Module):
    """Parameters multiplied without any module: `x @ W`, `x @ W.T`, `F.linear`, `torch.addmm`."""

    def __init__(self) -> None:
        """Build one weight for each spelling."""
        super().__init__()
        self.right = nn.Parameter(torch.randn(9, 12) / 3)
        self.transposed = nn.Parameter(torch.randn(10, 12) / 3)
        self.functional = nn.Parameter(torch.randn(8, 10) / 3)
        self.functional_bias = nn.Parameter(torch.zeros(8))
        self.fused = nn.Parameter(torch.randn(8, 3) / 3)
        self.fused_bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, averaged over the second axis of x: [batch, time, 9]."""
        hidden = torch.tanh(x @ self.right)
        hidden = torch.tanh(hidden @ self.transposed.T)
        hidden = torch.tanh(F.linear(hidden, self.functional, self.functional_bias))
        return torch.addmm(self.fused_bias, hidden.mean(dim=1), self.fused)


def functional_linear() -> Example:
    """Linear layers written as products of bare parameters."""
    return Example(FunctionalLinear(), nn.CrossEntropyLoss(), torch.randn(4, 3, 9), classes(4, count=3))


class Checkpointed(nn.Module):
    """Two blocks whose activations are computed again in the backward pass."""

    def __init__(self) -> None:
        """Build the blocks and the head."""
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Dropout(0.0), nn.Linear(24, 12)) for _ in range(2)
        )
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return self.head(x)


def checkpointed() -> Example:
    """Activation checkpointing, which repeats forward products in the backward half."""
    return Example(Checkpointed(), nn.CrossEntropyLoss(), torch.randn(5, 12), classes(5, count=4))


class KeywordInputs(nn.Module):
    """A recommender: an embedded category next to a numeric description."""

    def __init__(self) -> None:
        """Build the table and the layers."""
        super().__init__()
        self.category = nn.Embedding(11, 6)
        self.description = nn.Linear(7, 6)
        self.head = nn.Linear(12, 1)

    def forward(self, *, description: Tensor, category: Tensor) -> Tensor:
        """One score for each example."""
        numeric = torch.relu(self.description(description))
        return self.head(torch.cat([numeric, self.category(category)], dim=-1)).squeeze(-1)


def keyword_inputs() -> Example:
    """Inputs as a dict, binary targets."""
    inputs = {"description": torch.randn(5, 7), "category": classes(5, count=11)}
    return Example(KeywordInputs(), nn.BCEWithLogitsLoss(), inputs, classes(5, count=2).float())


class TwoTowers(nn.Module):
    """Two inputs of different width, compared by every pair's inner product."""

    def __init__(self) -> None:
        """Build both towers."""
        super().__init__()
        self.query = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6))
        self.document = nn.Sequential(nn.Linear(11, 16), nn.ReLU(), nn.Linear(16, 6))

    def forward(self, query: Tensor, document: Tensor) -> Tensor:
        """Similarity of each query to each document of the batch: [batch, batch]."""
        return F.normalize(self.query(query), dim=-1) @ F.normalize(self.document(document), dim=-1).T


def positional_inputs() -> Example:
    """Inputs as a tuple; each query's own document is its class."""
    inputs = (torch.randn(4, 8), torch.randn(4, 11))
    return Example(TwoTowers(), nn.CrossEntropyLoss(), inputs, torch.arange(4))


def frozen_backbone() -> Example:
    """Fine-tuning: the first layer and one bias do not require gradients."""
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return Example(model, nn.CrossEntropyLoss(), torch.randn(5, 10), classes(5, count=3))


def multi_output_regression() -> Example:
    """Several real outputs, squared error with the sum reduction."""
    model = nn.Sequential(
        nn.Linear(7, 20), nn.SiLU(), nn.LayerNorm(20), nn.Linear(20, 20), nn.SiLU(), nn.Linear(20, 4)
    )
    return Example(model, nn.MSELoss(reduction="sum"), torch.randn(5, 7), torch.randn(5, 4))


def multi_label() -> Example:
    """Several independent yes-or-no labels for each example."""
    model = nn.Sequential(nn.Linear(9, 18), nn.LeakyReLU(), nn.Linear(18, 18), nn.ELU(), nn.Linear(18, 6))
    return Example(model, nn.BCEWithLogitsLoss(), torch.randn(4, 9), classes(4, 6, count=2).float())


def weight_norm() -> Example:
    """One layer's weight is a length times a direction, the others are plain."""
    normalised = parametrizations.weight_norm(nn.Linear(6, 6))
    model = nn.Sequential(
        nn.Linear(14, 32), nn.Tanh(), nn.Linear(32, 6), nn.Tanh(), normalised, nn.Linear(6, 4)
    )
    return Example(model, nn.CrossEntropyLoss(), torch.randn(5, 14), classes(5, count=4))


class MaskedLinear(nn.Linear):
    """A linear layer whose weight is multiplied by a fixed mask."""

    mask: Tensor

    def __init__(self, d_in: int, d_out: int) -> None:
        """Keep about half of the weights."""
        super().__init__(d_in, d_out)
        self.register_buffer("mask", (torch.rand(d_out, d_in) > 0.5).float())

    def forward(self, input: Tensor) -> Tensor:
        """The product with the masked weight."""
        return F.linear(input, self.weight * self.mask, self.bias)


def masked_weight() -> Example:
    """One pruned layer among plain ones: its gradient is a product times the mask."""
    model = nn.Sequential(
        nn.Linear(14, 32), nn.Tanh(), nn.Linear(32, 6), nn.Tanh(), MaskedLinear(6, 6), nn.Linear(6, 4)
    )
    return Example(model, nn.CrossEntropyLoss(), torch.randn(5, 14), classes(5, count=4))


MODELS = by_name(
    mlp,
    reused_layer,
    tied_autoencoder,
    functional_linear,
    checkpointed,
    keyword_inputs,
    positional_inputs,
    frozen_backbone,
    multi_output_regression,
    multi_label,
    weight_norm,
    masked_weight,
)
