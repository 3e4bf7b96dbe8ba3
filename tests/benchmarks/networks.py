"""The two networks that the cost benchmarks measure: ResNet-50 and GPT-2 small, in plain PyTorch.

Shapes are the published ones (ResNet-50: He et al. 2015, arXiv:1512.03385, table 1, with the stride in the
3x3 convolution; GPT-2 small: Radford et al. 2019). Weights are at random: only shapes matter here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXPANSION = 4


@final
class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution beside a shortcut; the last widens four times."""

    def __init__(self, d_in: int, width: int, *, stride: int) -> None:
        super().__init__()
        d_out = EXPANSION * width
        self.conv1 = nn.Conv2d(d_in, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, d_out, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(d_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or d_in != d_out:
            conv = nn.Conv2d(d_in, d_out, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(d_out))

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, 4 width, H / stride, W / stride] of features [N, d_in, H, W]."""
        residual = torch.relu(self.norm1(self.conv1(x)))
        residual = torch.relu(self.norm2(self.conv2(residual)))
        return torch.relu(self.norm3(self.conv3(residual)) + self.shortcut(x))


@final
class ResNet(nn.Module):
    """A 7x7 stem, four stages of bottlenecks and a linear head."""

    def __init__(self, blocks: Sequence[int], *, width: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        stages, d_in = [], width
        for index, num_blocks in enumerate(blocks):
            stage = []
            for block in range(num_blocks):
                stride = 2 if block == 0 and index > 0 else 1
                stage.append(Bottleneck(d_in, width << index, stride=stride))
                d_in = EXPANSION * (width << index)
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(d_in, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, 3, H, W]; H and W are multiples of 32."""
        return self.head(self.stages(self.stem(images)).mean(dim=(2, 3)))


def resnet50(*, width: int = 64, num_classes: int = 1000) -> ResNet:
    """ResNet-50: 53 convolutions and a head, 25,557,032 parameters at width 64.

    width: channels of the stem; all other widths follow in proportion.
    """
    return ResNet((3, 4, 6, 3), width=width, num_classes=num_classes)


@final
class Attention(nn.Module):
    """Causal self-attention; one linear layer makes queries, keys and values."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, width] to [N, T, width]."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(heads.transpose(1, 2).flatten(2))


@final
class TransformerBlock(nn.Module):
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
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


@final
class GPT2(nn.Module):
    """Token and position embeddings, pre-norm blocks, and a head that is the token embedding."""

    def __init__(self, *, vocabulary: int, context: int, width: int, num_heads: int, num_blocks: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, num_heads) for _ in range(num_blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.02)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [N, T, vocabulary] of tokens [N, T]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(positions)
        return self.head(self.norm(self.blocks(x)))


def gpt2_small(
    *,
    vocabulary: int = 50257,
    context: int = 1024,
    width: int = 768,
    num_heads: int = 12,
    num_blocks: int = 12,
) -> GPT2:
    """GPT-2 small: 124,439,808 parameters, with the tied head counted once."""
    return GPT2(
        vocabulary=vocabulary, context=context, width=width, num_heads=num_heads, num_blocks=num_blocks
    )


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats a token. logits: [N, T, vocabulary]; targets: [N, T]."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
