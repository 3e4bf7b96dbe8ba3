"""Mixtures of experts in which every expert runs on every token, weighted by a softmax router.

Each factory returns one `Example`. No expert is chosen by Python, so the graph does not depend on the data.
"""

import torch
from torch import Tensor, nn

from .example import Example, by_name, classes, token_cross_entropy


class BatchedExperts(nn.Module):
    """Experts as one batched product; weights [experts, d_in, d_out] and one bias for each expert."""

    def __init__(self, d_model: int, d_hidden: int, experts: int) -> None:
        """Build router and experts."""
        super().__init__()
        self.router = nn.Linear(d_model, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, d_model, d_hidden) / d_model**0.5)
        self.up_bias = nn.Parameter(torch.zeros(experts, 1, d_hidden))
        self.down = nn.Parameter(torch.randn(experts, d_hidden, d_model) / d_hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Input plus the router's average of the experts; x: [batch, time, d_model]."""
        tokens = x.flatten(0, 1)
        copies = tokens.expand(len(self.up), -1, -1)
        hidden = torch.relu(torch.baddbmm(self.up_bias, copies, self.up))
        outputs = torch.bmm(hidden, self.down)
        gate = self.router(tokens).softmax(dim=-1)
        return x + (gate.T[:, :, None] * outputs).sum(dim=0).view_as(x)


class EinsumExperts(nn.Module):
    """The same in einsum, with gated (SwiGLU) experts whose weights are [experts, d_out, d_in]."""

    def __init__(self, d_model: int, d_hidden: int, experts: int) -> None:
        """Build router and experts."""
        super().__init__()
        self.router = nn.Linear(d_model, experts)
        self.gate = nn.Parameter(torch.randn(experts, d_hidden, d_model) / d_model**0.5)
        self.up = nn.Parameter(torch.randn(experts, d_hidden, d_model) / d_model**0.5)
        self.down = nn.Parameter(torch.randn(experts, d_model, d_hidden) / d_hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Input plus the router's average of the experts; x: [batch, time, d_model]."""
        gate = torch.einsum("btd,efd->btef", x, self.gate)
        up = torch.einsum("btd,efd->btef", x, self.up)
        outputs = torch.einsum("btef,edf->bted", nn.functional.silu(gate) * up, self.down)
        return x + torch.einsum("bted,bte->btd", outputs, self.router(x).softmax(dim=-1))


class ExpertLanguageModel(nn.Module):
    """Embedded tokens, two expert layers between norms, a head."""

    def __init__(self, make_experts: type[BatchedExperts] | type[EinsumExperts]) -> None:
        """Build the layers around the given kind of experts."""
        super().__init__()
        self.embedding = nn.Embedding(16, 12)
        self.layers = nn.Sequential(
            make_experts(12, 16, 4), nn.LayerNorm(12), make_experts(12, 16, 3), nn.LayerNorm(12)
        )
        self.head = nn.Linear(12, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token: [batch, time, vocabulary]."""
        return self.head(self.layers(self.embedding(tokens)))


def batched_experts() -> Example:
    """Experts by `bmm` and `baddbmm`."""
    model = ExpertLanguageModel(BatchedExperts)
    return Example(model, token_cross_entropy, classes(3, 5, count=16), classes(3, 5, count=16))


def einsum_experts() -> Example:
    """Experts by einsum."""
    model = ExpertLanguageModel(EinsumExperts)
    return Example(model, token_cross_entropy, classes(3, 5, count=16), classes(3, 5, count=16))


MODELS = by_name(batched_experts, einsum_experts)
