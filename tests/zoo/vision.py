"""Image classifiers of the well-known families, at a width of about eight channels.

Each factory returns one `Example` with a batch of three or four small images.
"""

import torch
from torch import Tensor, nn

from .example import Example, by_name, classes


def batch_norm_network() -> Example:
    """Convolution, batch norm, pooling, linear; the convolutions carry a bias although a norm follows."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 4, 5),
    )
    return Example(model, nn.CrossEntropyLoss(), torch.randn(4, 3, 8, 8), classes(4, count=5))


def inplace_relu() -> Example:
    """Activations that overwrite the output of the layer before them."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(8 * 16, 10),
        nn.ReLU(inplace=True),
        nn.Linear(10, 3),
    )
    return Example(model, nn.CrossEntropyLoss(), torch.randn(4, 1, 8, 8), classes(4, count=3))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, d_in: int, d_out: int, *, stride: int) -> None:
        """Build both branches."""
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(d_in, d_out, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(d_out),
            nn.ReLU(),
            nn.Conv2d(d_out, d_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(d_out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or d_in != d_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(d_in, d_out, 1, stride=stride, bias=False), nn.BatchNorm2d(d_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Sum of both branches, rectified."""
        return torch.relu(self.body(x) + self.shortcut(x))


def _classifier(*layers: nn.Module, channels: int, num_classes: int = 5) -> nn.Sequential:
    """The layers, then global average pooling and a linear head."""
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def _images(*layers: nn.Module, channels: int, size: int = 8) -> Example:
    """A classifier over the layers, with four random colour images."""
    model = _classifier(*layers, channels=channels)
    return Example(model, nn.CrossEntropyLoss(), torch.randn(4, 3, size, size), classes(4, count=5))


def resnet() -> Example:
    """Three residual blocks, one of them strided."""
    return _images(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        BasicBlock(8, 8, stride=1),
        BasicBlock(8, 12, stride=2),
        BasicBlock(12, 12, stride=1),
        channels=12,
    )


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter each channel alone, project by 1x1, add."""

    def __init__(self, channels: int, *, expansion: int) -> None:
        """Build the three convolutions."""
        super().__init__()
        d_hidden = channels * expansion
        self.body = nn.Sequential(
            nn.Conv2d(channels, d_hidden, 1, bias=False),
            nn.BatchNorm2d(d_hidden),
            nn.ReLU6(),
            nn.Conv2d(d_hidden, d_hidden, 3, padding=1, groups=d_hidden, bias=False),
            nn.BatchNorm2d(d_hidden),
            nn.ReLU6(),
            nn.Conv2d(d_hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Input plus filtered input."""
        return x + self.body(x)


def mobilenet() -> Example:
    """Depthwise convolutions between pointwise ones."""
    blocks = (InvertedResidual(8, expansion=3), InvertedResidual(8, expansion=2))
    return _images(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Hardswish(), *blocks, channels=8, size=12)


def grouped_convolution() -> Example:
    """Groups of several channels, strided and dilated, with a bias (ResNeXt's middle layer)."""
    return _images(
        nn.Conv2d(3, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4),
        nn.ReLU(),
        nn.Conv2d(12, 8, 3, padding=2, dilation=2, groups=2),
        nn.ReLU(),
        channels=8,
        size=10,
    )


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, then a pointwise network over channels kept last, scaled for each channel."""

    def __init__(self, channels: int) -> None:
        """Build the layers; the layer scale starts at one half so that every gradient is felt."""
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, 4 * channels)
        self.project = nn.Linear(4 * channels, channels)
        self.layer_scale = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Input plus the scaled branch; x: [batch, channels, height, width]."""
        hidden = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        hidden = self.layer_scale * self.project(nn.functional.gelu(self.expand(hidden)))
        return x + hidden.permute(0, 3, 1, 2)


def convnext() -> Example:
    """Patch stem and two ConvNeXt blocks."""
    return _images(nn.Conv2d(3, 16, 2, stride=2), ConvNeXtBlock(16), ConvNeXtBlock(16), channels=16, size=10)


class DenseLayer(nn.Module):
    """Norm, activation, convolution; the output is joined to the input."""

    def __init__(self, d_in: int, *, growth: int) -> None:
        """Build the layer."""
        super().__init__()
        self.norm = nn.BatchNorm2d(d_in)
        self.conv = nn.Conv2d(d_in, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Input and new channels side by side."""
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], dim=1)


def densenet() -> Example:
    """Three densely connected layers, a transition that pools."""
    layers = (DenseLayer(8, growth=4), DenseLayer(12, growth=4), DenseLayer(16, growth=4))
    transition = (nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1, bias=False), nn.AvgPool2d(2))
    return _images(nn.Conv2d(3, 8, 3, padding=1, bias=False), *layers, *transition, channels=10)


class InceptionBlock(nn.Module):
    """Four branches that read one tensor; three of them begin with a 1x1 convolution of it."""

    def __init__(self, d_in: int) -> None:
        """Build the branches."""
        super().__init__()
        self.point = nn.Conv2d(d_in, 4, 1)
        self.small = nn.Sequential(nn.Conv2d(d_in, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1))
        self.large = nn.Sequential(
            nn.Conv2d(d_in, 3, 1),
            nn.ReLU(),
            nn.Conv2d(3, 4, (1, 5), padding=(0, 2)),
            nn.Conv2d(4, 4, (5, 1), padding=(2, 0)),
        )
        self.pooled = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), nn.Conv2d(d_in, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        """All branches side by side: 18 channels."""
        return torch.relu(torch.cat([self.point(x), self.small(x), self.large(x), self.pooled(x)], dim=1))


def inception() -> Example:
    """Two inception blocks."""
    return _images(nn.Conv2d(3, 8, 3), InceptionBlock(8), InceptionBlock(18), channels=18)


class SqueezeExcitation(nn.Module):
    """Channels are scaled by a gate computed from their means."""

    def __init__(self, channels: int) -> None:
        """Build the convolution and the gate."""
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.squeeze = nn.Linear(channels, 4)
        self.excite = nn.Linear(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Input plus the gated convolution."""
        hidden = torch.relu(self.conv(x))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(hidden.mean(dim=(2, 3))))))
        return x + hidden * gate[:, :, None, None]


def squeeze_excitation() -> Example:
    """Two gated blocks: linear layers inside a convolutional network."""
    return _images(
        nn.Conv2d(3, 8, 3, stride=2), SqueezeExcitation(8), SqueezeExcitation(8), channels=8, size=9
    )


MODELS = by_name(
    batch_norm_network,
    inplace_relu,
    resnet,
    mobilenet,
    grouped_convolution,
    convnext,
    densenet,
    inception,
    squeeze_excitation,
)
