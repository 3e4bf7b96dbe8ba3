"""Convolutions beyond the image classifier: other ranks, paddings, norms, transposes, dense outputs.

Each factory returns one `Example`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .example import Example, by_name, classes


class UNet(nn.Module):
    """One level of down and up: the finer features skip across and join the upsampled ones."""

    def __init__(self) -> None:
        """Build the five layers."""
        super().__init__()
        self.fine = nn.Conv2d(2, 6, 3, padding=1)
        self.down = nn.Conv2d(6, 10, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(10, 10, 3, padding=1)
        self.up = nn.ConvTranspose2d(10, 6, 2, stride=2)
        self.join = nn.Conv2d(12, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of every pixel: [batch, 3, height, width]."""
        fine = torch.relu(self.fine(x))
        coarse = torch.relu(self.middle(torch.relu(self.down(fine))))
        return self.head(torch.relu(self.join(torch.cat([fine, self.up(coarse)], dim=1))))


def unet() -> Example:
    """Segmentation: one label for each pixel, a transposed convolution on the way up."""
    return Example(UNet(), nn.CrossEntropyLoss(), torch.randn(3, 2, 8, 8), classes(3, 8, 8, count=3))


def transposed_convolution() -> Example:
    """A decoder: transposed convolutions in one and two dimensions, grouped, padded, with output padding."""
    model = nn.Sequential(
        nn.Linear(6, 8 * 5),
        nn.Unflatten(1, (8, 5)),
        nn.ConvTranspose1d(8, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.ReLU(),
        nn.Unflatten(1, (6, 1)),
        nn.ConvTranspose2d(6, 2, (3, 2), dilation=(1, 2)),
    )
    return Example(model, nn.MSELoss(), torch.randn(4, 6), torch.randn(4, 2, 3, 12))


class GatedLayer(nn.Module):
    """WaveNet's unit: a dilated filter and a dilated gate read one signal; residual and skip outputs."""

    def __init__(self, channels: int, *, dilation: int) -> None:
        """Build filter, gate and the pointwise layers."""
        super().__init__()
        self.filter = nn.Conv1d(channels, channels, 3, padding="same", dilation=dilation)
        self.gate = nn.Conv1d(channels, channels, 3, padding="same", dilation=dilation)
        self.residual = nn.Conv1d(channels, channels, 1)
        self.skip = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The signal for the next layer and this layer's part of the output."""
        hidden = torch.tanh(self.filter(x)) * torch.sigmoid(self.gate(x))
        return x + self.residual(hidden), self.skip(hidden)


class WaveNet(nn.Module):
    """Gated dilated layers over a one-dimensional signal, a class for every sample."""

    def __init__(self) -> None:
        """Build the layers."""
        super().__init__()
        self.start = nn.Conv1d(1, 8, 3, padding="same")
        self.layers = nn.ModuleList(GatedLayer(8, dilation=2**level) for level in range(3))
        self.head = nn.Conv1d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores: [batch, 6, time]."""
        x = self.start(x)
        total = torch.zeros_like(x)
        for layer in self.layers:
            x, skip = layer(x)
            total = total + skip
        return self.head(torch.relu(total + x))


def wavenet() -> Example:
    """Audio: 'same' padding and growing dilation in one dimension."""
    return Example(WaveNet(), nn.CrossEntropyLoss(), torch.randn(3, 1, 20), classes(3, 20, count=6))


def audio_network() -> Example:
    """A strided network on a raw waveform."""
    model = nn.Sequential(
        nn.Conv1d(1, 8, 8, stride=4),
        nn.BatchNorm1d(8),
        nn.GELU(),
        nn.Conv1d(8, 12, 3, stride=2, dilation=2, padding=1),
        nn.BatchNorm1d(12),
        nn.GELU(),
        nn.AdaptiveAvgPool1d(2),
        nn.Flatten(),
        nn.Linear(24, 4),
    )
    return Example(model, nn.CrossEntropyLoss(), torch.randn(4, 1, 64), classes(4, count=4))


def video_network() -> Example:
    """Convolutions over time, height and width: full, strided, factored and depthwise."""
    model = nn.Sequential(
        nn.Conv3d(2, 6, 3, padding=1),
        nn.BatchNorm3d(6),
        nn.ReLU(),
        nn.Conv3d(6, 8, (1, 3, 3), stride=(1, 2, 2), bias=False),
        nn.ReLU(),
        nn.Conv3d(8, 8, (3, 1, 1), padding="same", groups=8),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    return Example(model, nn.CrossEntropyLoss(), torch.randn(3, 2, 4, 6, 6), classes(3, count=3))


def padding_modes() -> Example:
    """Circular, reflected and replicated borders; kernels of even width with 'same' padding."""
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, padding_mode="circular"),
        nn.Tanh(),
        nn.Conv2d(6, 6, 3, padding=(2, 1), padding_mode="reflect"),
        nn.Tanh(),
        nn.Conv2d(6, 6, 3, stride=2, padding=1, padding_mode="replicate"),
        nn.Tanh(),
        nn.Conv2d(6, 6, (2, 4), padding="same"),
        nn.Tanh(),
        nn.Conv2d(6, 6, 2, padding="same", dilation=3, padding_mode="circular"),
        nn.Tanh(),
        nn.Conv2d(6, 4, 2, padding="valid"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return Example(model, nn.CrossEntropyLoss(), torch.randn(4, 2, 8, 8), classes(4, count=4))


def even_kernel_same() -> Example:
    """'same' padding of even kernels in one dimension, where one side gets one zero more."""
    model = nn.Sequential(
        nn.Conv1d(2, 6, 4, padding="same"),
        nn.ReLU(),
        nn.Conv1d(6, 6, 2, padding="same", dilation=3, groups=3),
        nn.ReLU(),
        nn.Conv1d(6, 3, 1, padding="same"),
    )
    return Example(model, nn.MSELoss(), torch.randn(3, 2, 9), torch.randn(3, 3, 9))


def group_norm_network() -> Example:
    """Norms over groups of channels and over single channels."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(4, 8),
        nn.SiLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.InstanceNorm2d(12, affine=True),
        nn.SiLU(),
        nn.Conv2d(12, 12, 3, padding=1),
        nn.GroupNorm(1, 12),
        nn.Flatten(),
        nn.Linear(12 * 9, 4),
    )
    return Example(model, nn.CrossEntropyLoss(), torch.randn(3, 3, 6, 6), classes(3, count=4))


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose weight is centred and scaled for each output channel before use."""

    def forward(self, input: Tensor) -> Tensor:
        """The convolution with the standardised weight."""
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        deviation = self.weight.std(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(
            input, (self.weight - mean) / (deviation + 1e-5), self.bias, self.stride, self.padding
        )


def standardised_weight() -> Example:
    """One standardised convolution between plain ones."""
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.GroupNorm(2, 12),
        nn.ReLU(),
        nn.Conv2d(12, 4, 3),
        nn.ReLU(),
        StandardisedConv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 16, 20),
        nn.ReLU(),
        nn.Linear(20, 4),
    )
    return Example(model, nn.CrossEntropyLoss(), torch.randn(4, 3, 8, 8), classes(4, count=4))


MODELS = by_name(
    unet,
    transposed_convolution,
    wavenet,
    audio_network,
    video_network,
    padding_modes,
    even_kernel_same,
    group_norm_network,
    standardised_weight,
)
