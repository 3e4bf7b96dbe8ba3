"""A TARGET with experts as modules in blocks: `blocks.N.experts.M` collapses in both integers."""

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, WIDTH, EXPERTS, LAYERS = 7, 6, 3, 4


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.gelu(self.up(x))
        return self.down(hidden)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
        self.scale = nn.Parameter(torch.ones(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale.sum(0)
        weights = self.gate(x).softmax(-1)
        outputs = [weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts)]
        return x + torch.stack(outputs).sum(0)


class TinyMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def build() -> tuple[nn.Module, object, Tensor, Tensor]:
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (2, 6))
    return TinyMoE(), loss_fn, tokens[:, :-1], tokens[:, 1:]
