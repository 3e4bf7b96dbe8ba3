"""The networks that the cost benchmarks measure: ResNet-50, GPT-2 small and two small ones, in plain PyTorch.

Shapes are the published ones (ResNet-50: He et al. 2015, arXiv:1512.03385, table 1, with the stride in the
3x3 convolution; ResNet-20 for CIFAR: section 4.2, with 1x1 convolutions where a shortcut changes shape; GPT-2
small: Radford et al. 2019). Weights are at random: only shapes matter here. Residual blocks, shortcuts and
transformer blocks are those of `examples/`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from mnist_resnet import Block, shortcut  # noqa: E402
from text_transformer import Transformer, next_byte_loss  # noqa: E402

EXPANSION = 4
next_token_loss = next_byte_loss


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
        self.shortcut = shortcut(d_in, d_out, stride=stride)

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
class SmallResNet(nn.Module):
    """A 3x3 stem, three stages of three blocks and a linear head: 20 layers."""

    def __init__(self, *, width: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        blocks, d_in = [], width
        for stage in range(3):
            for block in range(3):
                d_out = width << stage
                blocks.append(Block(d_in, d_out, stride=2 if stage and not block else 1))
                d_in = d_out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(d_in, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, 3, 32, 32]."""
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))


def resnet20(*, width: int = 16, num_classes: int = 10) -> SmallResNet:
    """ResNet-20 for CIFAR: 272,474 parameters at width 16, of which 2,752 in two 1x1 shortcuts."""
    return SmallResNet(width=width, num_classes=num_classes)


def small_transformer(
    *, width: int = 256, num_blocks: int = 6, context: int = 128, vocabulary: int = 256
) -> Transformer:
    """A decoder with heads of 64; on bytes, if not said otherwise."""
    model = Transformer(width=width, num_heads=width // 64, num_blocks=num_blocks)
    model.token, model.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
    model.head = nn.Linear(width, vocabulary)
    return model


def gpt2_small() -> Transformer:
    """GPT-2 small: 124,439,808 parameters, with the head, which is the token embedding, counted once."""
    model = Transformer(width=768, num_heads=12, num_blocks=12)
    model.token, model.position = nn.Embedding(50257, 768), nn.Embedding(1024, 768)
    model.head = nn.Linear(768, 50257, bias=False)
    model.head.weight = model.token.weight
    return model
