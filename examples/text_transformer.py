"""A small causal transformer on Python's help texts, byte by byte: `python examples/text_transformer.py`.

Fused qkv, LayerNorm, embeddings. As a TARGET: `kfac-fx inspect examples/text_transformer.py`.
"""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fx
from training import LossFn, Split, Task, example_batch, main, split

VOCABULARY = 256
CONTEXT = 64


class Attention(nn.Module):
    """Causal self-attention; one linear layer makes queries, keys and values."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, width] to [N, T, width]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(heads.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a LayerNorm and beside a residual path."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, width] to [N, T, width]."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Predicts the next byte at every position."""

    def __init__(self, *, width: int = 64, num_heads: int = 4, num_blocks: int = 2) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(num_blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [N, T, 256] of bytes [N, T]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(positions)
        return self.head(self.norm(self.blocks(x)))


def next_byte_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats a byte."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def help_texts() -> tuple[Split, Split]:
    """Windows of 64 bytes and the bytes that follow; a tenth of the windows is the test split."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    num_windows = (len(tokens) - 1) // CONTEXT
    inputs = tokens[: num_windows * CONTEXT].view(num_windows, CONTEXT)
    targets = tokens[1 : num_windows * CONTEXT + 1].view(num_windows, CONTEXT)
    return split(inputs, targets, num_test=num_windows // 10)


TASK = Task(
    name="Python help texts (transformer)",
    data=help_texts,
    model=Transformer,
    loss_fn=next_byte_loss,
    batch_size=32,
    epochs=2,
    lr=0.1,
    sgd_lr=0.1,
    methods={"kfac": kfac_fx.KFAC(damping=0.03)},
)


def build() -> tuple[nn.Module, LossFn, Tensor, Tensor]:
    """Model, loss function, inputs and targets for `kfac-fx`."""
    return example_batch(TASK)


if __name__ == "__main__":
    main(TASK)
