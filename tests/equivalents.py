"""A model that carries many layers side by side, and convolutions written in other ways."""

import math

import torch
from torch import Tensor, nn

CLASSES = 3


class Branches(nn.Module):
    """Layers side by side on one input; each output goes through tanh into fixed random logits of its own.

    Layers with the same key share their logits' features, so that equal outputs receive equal gradients.
    """

    def __init__(self, layers: list[nn.Module], x: Tensor, *, keys: list[int] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers).double()
        self.keys = list(range(len(layers))) if keys is None else keys
        for key, layer in zip(self.keys, self.layers, strict=True):
            if f"features_{key}" not in dict(self.named_buffers()):
                size = layer(x)[0].numel()
                features = torch.randn(size, CLASSES, dtype=x.dtype) / math.sqrt(size)
                self.register_buffer(f"features_{key}", features)

    def forward(self, x: Tensor) -> Tensor:
        logits = [
            layer(x).tanh().flatten(1) @ self.get_buffer(f"features_{key}")
            for key, layer in zip(self.keys, self.layers, strict=True)
        ]
        return torch.stack(logits).sum(0)


class Split(nn.Module):
    """A two-group convolution as two ungrouped ones on the groups' own channels."""

    def __init__(self, grouped: nn.Module) -> None:
        super().__init__()
        kind, size, (d_out, d_in) = type(grouped), grouped.kernel_size, grouped.weight.shape[:2]
        self.halves = nn.ModuleList(
            kind(d_in, d_out // 2, size, stride=grouped.stride, padding=grouped.padding) for _ in range(2)
        ).double()
        for half, weight, bias in zip(
            self.halves, grouped.weight.chunk(2), grouped.bias.chunk(2), strict=True
        ):
            half.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([half(part) for half, part in zip(self.halves, x.chunk(2, 1), strict=True)], dim=1)


def as_linear(conv: nn.Module) -> nn.Linear:
    """A linear layer with the convolution's flattened weight and its bias."""
    linear = nn.Linear(conv.weight[0].numel(), conv.out_channels).double()
    linear.load_state_dict({"weight": conv.weight.detach().flatten(1), "bias": conv.bias.detach()})
    return linear


class Pointwise(nn.Module):
    """A 1x1 convolution written as a linear layer over the channels of every pixel."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.linear = as_linear(conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(2).mT).mT


class Whole(nn.Module):
    """A convolution whose kernel is the whole input, written as a linear layer over the flattened input."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.linear = as_linear(conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


class Lifted(nn.Module):
    """A 1-d convolution as a 2-d or 3-d one over leading axes of length one."""

    def __init__(self, narrow: nn.Conv1d, kind: type[nn.Module], added: int) -> None:
        super().__init__()
        self.ones, zeros = (1,) * added, (0,) * added
        self.conv = kind(
            narrow.in_channels,
            narrow.out_channels,
            (*self.ones, *narrow.kernel_size),
            stride=(*self.ones, *narrow.stride),
            padding=(*zeros, *narrow.padding),
            dilation=(*self.ones, *narrow.dilation),
            groups=narrow.groups,
        ).double()
        weight = narrow.weight.detach().view_as(self.conv.weight)
        self.conv.load_state_dict({"weight": weight, "bias": narrow.bias.detach()})

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.view(*x.shape[:2], *self.ones, x.shape[2]))


class Padded(nn.Module):
    """Explicit padding before a convolution without padding that has the given one's values."""

    def __init__(self, conv: nn.Module, amounts: tuple[int, ...], mode: str) -> None:
        super().__init__()
        self.amounts, self.mode = amounts, mode
        self.conv = type(conv)(
            conv.in_channels, conv.out_channels, conv.kernel_size, dilation=conv.dilation
        ).double()
        self.conv.load_state_dict(conv.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.pad(x, self.amounts, mode=self.mode))
