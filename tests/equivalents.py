"""Convolutions written in other ways, and a model that carries many of them side by side."""

import math

import torch
from torch import Tensor, nn

CLASSES = 3


class Branches(nn.Module):
    """Layers side by side on one input; each output goes through tanh into its own fixed random logits."""

    def __init__(self, layers: list[nn.Module], x: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers).double()
        for index, layer in enumerate(self.layers):
            size = layer(x)[0].numel()
            features = torch.randn(size, CLASSES, dtype=x.dtype) / math.sqrt(size)
            self.register_buffer(f"features_{index}", features)

    def forward(self, x: Tensor) -> Tensor:
        logits = [
            layer(x).tanh().flatten(1) @ self.get_buffer(f"features_{index}")
            for index, layer in enumerate(self.layers)
        ]
        return torch.stack(logits).sum(0)


class Half(nn.Module):
    """One group of a two-group convolution as an ungrouped convolution of the group's own channels."""

    def __init__(self, grouped: nn.Module, group: int) -> None:
        super().__init__()
        self.group = group
        kind, size = type(grouped), grouped.kernel_size
        self.conv = kind(2, 3, size, stride=grouped.stride, padding=grouped.padding).double()
        self.conv.weight.data.copy_(grouped.weight[3 * group : 3 * group + 3])
        self.conv.bias.data.copy_(grouped.bias[3 * group : 3 * group + 3])

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, 2 * self.group : 2 * self.group + 2])


class Pointwise(nn.Module):
    """A 1x1 convolution written as a linear layer over the channels of every pixel."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(conv.in_channels, conv.out_channels).double()
        self.linear.weight.data.copy_(conv.weight.flatten(1))
        self.linear.bias.data.copy_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(2).mT).mT


class Whole(nn.Module):
    """A convolution whose kernel is the whole input, written as a linear layer over the flattened input."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(conv.weight[0].numel(), conv.out_channels).double()
        self.linear.weight.data.copy_(conv.weight.flatten(1))
        self.linear.bias.data.copy_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


class Padded(nn.Module):
    """Explicit padding before a convolution without padding that shares the given one's values."""

    def __init__(self, conv: nn.Module, amounts: tuple[int, ...], mode: str) -> None:
        super().__init__()
        self.amounts, self.mode = amounts, mode
        self.conv = type(conv)(4, 3, conv.kernel_size, dilation=conv.dilation).double()
        self.conv.load_state_dict(conv.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.pad(x, self.amounts, mode=self.mode))
