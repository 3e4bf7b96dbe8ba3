"""A small convolutional network on scikit-learn's 8x8 digits: `python examples/digits_conv.py`.

Convolutions and linear layers, all with a bias. As a TARGET: `kfac-fx inspect examples/digits_conv.py`.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import kfac_fx
from training import LossFn, Split, Task, example_batch, main, split


class ConvNet(nn.Module):
    """Three 3x3 convolutions and two linear layers, 18,506 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1, stride=2)
        self.hidden = nn.Linear(128, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10] of images [N, 1, 8, 8]."""
        x = torch.relu(self.conv1(images))
        x = torch.relu(self.conv2(x))
        x = torch.relu(self.conv3(x))
        x = torch.relu(self.hidden(x.flatten(1)))
        return self.head(x)


def digits() -> tuple[Split, Split]:
    """1,437 training and 360 test images with values from 0 to 1."""
    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16.0
    return split(images, torch.as_tensor(data.target), num_test=360)


TASK = Task(
    name="digits (conv net)",
    data=digits,
    model=ConvNet,
    loss_fn=nn.CrossEntropyLoss(),
    batch_size=128,
    epochs=20,
    lr=0.1,
    sgd_lr=0.2,
    methods={"kfac": kfac_fx.KFAC(damping=0.03)},
)


def build() -> tuple[nn.Module, LossFn, Tensor, Tensor]:
    """Model, loss function, inputs and targets for `kfac-fx`."""
    return example_batch(TASK)


if __name__ == "__main__":
    main(TASK)
