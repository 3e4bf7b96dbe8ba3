"""A TARGET with residual blocks of two widths: batch norms that share a row, convolutions that do not."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, d_in: int, d_out: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(d_in, d_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(d_out)
        self.conv2 = nn.Conv2d(d_out, d_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(d_out)
        self.shortcut = nn.Conv2d(d_in, d_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        residual = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(residual)) + self.shortcut(x))


class TinyResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.stages = nn.ModuleList(
            nn.ModuleList(
                Block(d_in, d_out, stride=s) for d_in, s in ((before, stride), (d_out, 1), (d_out, 1))
            )
            for before, d_out, stride in ((4, 4, 1), (4, 8, 2))
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(x.mean((2, 3)))


def build() -> tuple[nn.Module, object, Tensor, Tensor]:
    torch.manual_seed(0)
    return TinyResNet(), functional.cross_entropy, torch.randn(4, 3, 8, 8), torch.arange(4)
