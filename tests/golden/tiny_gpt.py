"""A TARGET with repeated blocks, a shared input, norms, grouped filters, frozen and unused parameters."""

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, WIDTH, CONTEXT, BATCH = 11, 8, 6, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q = self.q(normed)
        k = self.k(normed)
        v = self.v(normed)
        weights = (q @ k.transpose(1, 2) / WIDTH**0.5).softmax(-1)
        return x + self.out(weights @ v)


class TinyGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.filters = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.temperature = nn.Parameter(torch.ones(()))
        self.spare = nn.Parameter(torch.zeros(5))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.head.bias.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        x = x + self.filters(x.transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.temperature


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def build() -> tuple[nn.Module, object, Tensor, Tensor]:
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1))
    return TinyGPT(), next_token_loss, tokens[:, :-1], tokens[:, 1:]


def build_covered() -> tuple[nn.Module, object, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    model[0].weight.requires_grad_(False)
    return model, functional.mse_loss, torch.randn(BATCH, 3), torch.randn(BATCH, 2)
