"""Sequence models: a Llama written by hand, a selective state-space model, recurrent networks.

Each factory returns one `Example`. Loops over time are Python loops over short sequences.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .example import Example, by_name, classes, token_cross_entropy


class RMSNorm(nn.Module):
    """Scale by the inverse root mean square of the features, then by a learnt weight."""

    def __init__(self, features: int) -> None:
        """Build the weight."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """The normed features."""
        return self.weight * (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6))


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding; x: [batch, heads, time, d_head]."""
    time, d_head = x.shape[-2:]
    frequency = 100.0 ** (-torch.arange(0, d_head, 2, dtype=x.dtype, device=x.device) / d_head)
    angle = torch.outer(torch.arange(time, dtype=x.dtype, device=x.device), frequency)
    first, second = x.chunk(2, dim=-1)
    cosine, sine = angle.cos(), angle.sin()
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class LlamaBlock(nn.Module):
    """Grouped-query attention with rotary positions, then SwiGLU, both pre-normed and without biases."""

    def __init__(self, d_model: int, *, heads: int, key_heads: int) -> None:
        """Build the layers; several query heads share each of the `key_heads`."""
        super().__init__()
        self.d_head, self.repeats = d_model // heads, heads // key_heads
        self.attention_norm = RMSNorm(d_model)
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, key_heads * self.d_head, bias=False)
        self.value = nn.Linear(d_model, key_heads * self.d_head, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)
        self.network_norm = RMSNorm(d_model)
        self.gate = nn.Linear(d_model, 2 * d_model, bias=False)
        self.up = nn.Linear(d_model, 2 * d_model, bias=False)
        self.down = nn.Linear(2 * d_model, d_model, bias=False)

    def split(self, x: Tensor) -> Tensor:
        """Features into heads: [batch, heads, time, d_head]."""
        return x.unflatten(-1, (-1, self.d_head)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """The next residual stream."""
        normed = self.attention_norm(x)
        query = rotate(self.split(self.query(normed)))
        key = rotate(self.split(self.key(normed))).repeat_interleave(self.repeats, dim=1)
        value = self.split(self.value(normed)).repeat_interleave(self.repeats, dim=1)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        normed = self.network_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def llama() -> Example:
    """Two blocks between an embedding and an untied head."""
    model = nn.Sequential(
        nn.Embedding(20, 16),
        LlamaBlock(16, heads=4, key_heads=2),
        LlamaBlock(16, heads=4, key_heads=2),
        RMSNorm(16),
        nn.Linear(16, 20, bias=False),
    )
    return Example(model, token_cross_entropy, classes(3, 6, count=20), classes(3, 6, count=20))


class SelectiveStateSpace(nn.Module):
    """Mamba's mixer: a causal depthwise convolution, then a state whose decay depends on the input."""

    def __init__(self, d_model: int, *, d_inner: int, d_state: int, rank: int) -> None:
        """Build the layers; `rank` is the width of the step size's bottleneck."""
        super().__init__()
        self.sizes = (rank, d_state, d_state)
        self.input = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv = nn.Conv1d(d_inner, d_inner, 4, padding=3, groups=d_inner)
        self.selection = nn.Linear(d_inner, rank + 2 * d_state, bias=False)
        self.step_size = nn.Linear(rank, d_inner)
        self.log_decay = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(d_inner, 1))
        self.skip = nn.Parameter(torch.ones(d_inner))
        self.output = nn.Linear(d_inner, d_model, bias=False)

    def scan(self, signal: Tensor) -> Tensor:
        """Run the state through time; signal: [batch, time, d_inner]."""
        rank, write, read = self.selection(signal).split(self.sizes, dim=-1)
        step = F.softplus(self.step_size(rank))
        decay = torch.exp(step[..., None] * -self.log_decay.exp())
        drive = (step * signal)[..., None] * write[:, :, None, :]
        state = torch.zeros_like(drive[:, 0])
        outputs = []
        for time in range(signal.shape[1]):
            state = decay[:, time] * state + drive[:, time]
            outputs.append((state * read[:, time, None, :]).sum(dim=-1))
        return torch.stack(outputs, dim=1) + self.skip * signal

    def forward(self, x: Tensor) -> Tensor:
        """Input plus the gated scan; x: [batch, time, d_model]."""
        signal, gate = self.input(x).chunk(2, dim=-1)
        signal = self.conv(signal.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return x + self.output(self.scan(F.silu(signal)) * F.silu(gate))


def state_space() -> Example:
    """A Mamba-like language model of two layers."""
    mixers = [SelectiveStateSpace(12, d_inner=16, d_state=4, rank=2) for _ in range(2)]
    model = nn.Sequential(
        nn.Embedding(18, 12), mixers[0], RMSNorm(12), mixers[1], RMSNorm(12), nn.Linear(12, 18)
    )
    return Example(model, token_cross_entropy, classes(3, 6, count=18), classes(3, 6, count=18))


class Recurrent(nn.Module):
    """A recurrent core over embedded tokens, a class from its mean output."""

    def __init__(self, core: nn.RNNBase, *, d_out: int) -> None:
        """Build embedding and head around the core; d_out: the core's output features."""
        super().__init__()
        self.embedding = nn.Embedding(15, 8)
        self.core = core
        self.head = nn.Linear(d_out, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.core(self.embedding(tokens))[0].mean(dim=1))


def _recurrent(core: nn.RNNBase, *, d_out: int) -> Example:
    """A recurrent classifier with a batch of four short sequences."""
    model = Recurrent(core, d_out=d_out)
    return Example(model, nn.CrossEntropyLoss(), classes(4, 5, count=15), classes(4, count=4))


def lstm() -> Example:
    """Two layers of LSTM: each weight is used once for each time step."""
    return _recurrent(nn.LSTM(8, 12, num_layers=2, batch_first=True), d_out=12)


def gru() -> Example:
    """A GRU, whose recurrent bias sits inside the reset gate."""
    return _recurrent(nn.GRU(8, 12, batch_first=True), d_out=12)


def elman() -> Example:
    """The plain recurrent network, without biases."""
    return _recurrent(nn.RNN(8, 12, bias=False, batch_first=True), d_out=12)


def bidirectional_lstm() -> Example:
    """An LSTM read in both directions."""
    return _recurrent(nn.LSTM(8, 10, batch_first=True, bidirectional=True), d_out=20)


class CellLoop(nn.Module):
    """A recurrent cell called in a Python loop, a prediction at every step."""

    def __init__(self) -> None:
        """Build cell and head."""
        super().__init__()
        self.cell = nn.GRUCell(5, 10)
        self.head = nn.Linear(10, 5)

    def forward(self, series: Tensor) -> Tensor:
        """The prediction for each step; series: [batch, time, 5]."""
        hidden = series.new_zeros(len(series), 10)
        predictions = []
        for value in series.unbind(dim=1):
            hidden = self.cell(value, hidden)
            predictions.append(self.head(hidden))
        return torch.stack(predictions, dim=1)


def cell_loop() -> Example:
    """Forecasting with a `GRUCell`: squared error at every step."""
    return Example(CellLoop(), nn.MSELoss(), torch.randn(4, 5, 5), torch.randn(4, 5, 5))


MODELS = by_name(llama, state_space, lstm, gru, elman, bidirectional_lstm, cell_loop)
