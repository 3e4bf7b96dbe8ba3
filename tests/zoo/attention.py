"""Transformers written by hand and from `torch.nn`, in every spelling of their projections.

Each factory returns one `Example`: images for the vision models, tokens for the language models.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .example import Example, by_name, classes, token_cross_entropy


class MixerBlock(nn.Module):
    """Linear layers over tokens, through a transpose, then over channels."""

    def __init__(self, tokens: int, channels: int) -> None:
        """Build both networks."""
        super().__init__()
        self.token_norm = nn.LayerNorm(channels)
        self.over_tokens = nn.Sequential(nn.Linear(tokens, 12), nn.GELU(), nn.Linear(12, tokens))
        self.channel_norm = nn.LayerNorm(channels)
        self.over_channels = nn.Sequential(nn.Linear(channels, 24), nn.GELU(), nn.Linear(24, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Mixed tokens, [batch, tokens, channels] as they came."""
        x = x + self.over_tokens(self.token_norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.over_channels(self.channel_norm(x))


class Mixer(nn.Module):
    """Patches by a strided convolution, two mixer blocks, the mean token."""

    def __init__(self) -> None:
        """Build the layers."""
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, stride=4)
        self.blocks = nn.Sequential(MixerBlock(9, 12), MixerBlock(9, 12))
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.blocks(self.patches(images).flatten(2).transpose(1, 2)).mean(dim=1))


def mlp_mixer() -> Example:
    """MLP-Mixer: a linear layer along each axis of the tokens."""
    return Example(Mixer(), nn.CrossEntropyLoss(), torch.randn(4, 3, 12, 12), classes(4, count=5))


class VisionBlock(nn.Module):
    """Pre-norm attention by `nn.MultiheadAttention`, then a small network."""

    def __init__(self, d_model: int) -> None:
        """Build the layers."""
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = nn.MultiheadAttention(d_model, 2, batch_first=True)
        self.network_norm = nn.LayerNorm(d_model)
        self.network = nn.Sequential(
            nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The next residual stream."""
        query = self.attention_norm(x)
        x = x + self.attention(query, query, query, need_weights=False)[0]
        return x + self.network(self.network_norm(x))


class VisionTransformer(nn.Module):
    """Patches, a class token, learnt positions, two blocks."""

    def __init__(self, d_model: int = 24) -> None:
        """Build the layers."""
        super().__init__()
        self.patches = nn.Conv2d(3, d_model, 4, stride=4)
        self.class_token = nn.Parameter(torch.randn(1, 1, d_model) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 5, d_model) * 0.02)
        self.blocks = nn.Sequential(VisionBlock(d_model), VisionBlock(d_model))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, 5)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, read from the class token."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1) + self.positions
        return self.head(self.norm(self.blocks(tokens))[:, 0])


def vision_transformer() -> Example:
    """ViT with `nn.MultiheadAttention`."""
    return Example(VisionTransformer(), nn.CrossEntropyLoss(), torch.randn(3, 3, 8, 8), classes(3, count=5))


class EncoderClassifier(nn.Module):
    """`nn.TransformerEncoder` over embedded tokens, with a padding mask."""

    def __init__(self) -> None:
        """Build the layers."""
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        """Logits, read from the first token."""
        hidden = self.encoder(self.embedding(tokens), src_key_padding_mask=padding)
        return self.head(hidden[:, 0])


def transformer_encoder() -> Example:
    """`nn.TransformerEncoder` on sequences of unequal length."""
    padding = torch.arange(6) >= torch.tensor([[6], [4], [5]])
    inputs = (classes(3, 6, count=20), padding)
    return Example(EncoderClassifier(), nn.CrossEntropyLoss(), inputs, classes(3, count=3))


class Translator(nn.Module):
    """`nn.Transformer`: encoder, decoder with a causal mask and attention to the encoder."""

    causal: Tensor

    def __init__(self) -> None:
        """Build the layers; time comes first, as in `nn.Transformer`'s default.

        `tgt_is_causal` is stated in the call, otherwise `nn.Transformer` reads the mask's values to find out.
        """
        super().__init__()
        self.source = nn.Embedding(18, 16)
        self.target = nn.Embedding(18, 16)
        self.transformer = nn.Transformer(16, 2, 1, 1, dim_feedforward=32, dropout=0.0)
        self.head = nn.Linear(16, 18)
        self.register_buffer("causal", torch.full((4, 4), float("-inf")).triu(1))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits of the next target token: [batch, time, 18]."""
        hidden = self.transformer(
            self.source(source.T), self.target(target.T), tgt_mask=self.causal, tgt_is_causal=True
        )
        return self.head(hidden).transpose(0, 1)


def encoder_decoder() -> Example:
    """`nn.Transformer` with cross attention."""
    inputs = (classes(3, 5, count=18), classes(3, 4, count=18))
    return Example(Translator(), token_cross_entropy, inputs, classes(3, 4, count=18))


class GPTBlock(nn.Module):
    """Causal attention with one fused projection, written out in matmuls, then a small network."""

    def __init__(self, d_model: int, heads: int) -> None:
        """Build the layers."""
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.output = nn.Linear(d_model, d_model)
        self.network_norm = nn.LayerNorm(d_model)
        self.up = nn.Linear(d_model, 4 * d_model)
        self.down = nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """The next residual stream."""
        batch, time, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / (width // self.heads) ** 0.5
        causal = torch.ones(time, time, dtype=torch.bool, device=x.device).tril()
        weights = scores.masked_fill(~causal, float("-inf")).softmax(dim=-1)
        x = x + self.output((weights @ value).transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.network_norm(x))))


class GPT(nn.Module):
    """Tokens and positions, two blocks, a head that is the token table itself."""

    def __init__(self, vocabulary: int = 20, d_model: int = 24) -> None:
        """Build the layers and tie the head."""
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, d_model)
        nn.init.normal_(self.tokens.weight, std=0.1)
        self.positions = nn.Embedding(6, d_model)
        self.blocks = nn.Sequential(GPTBlock(d_model, 2), GPTBlock(d_model, 2))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token: [batch, time, vocabulary]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(positions))))


def gpt() -> Example:
    """A language model with fused qkv and tied embeddings."""
    return Example(GPT(), token_cross_entropy, classes(3, 6, count=20), classes(3, 6, count=20))


class EinsumAttention(nn.Module):
    """Attention whose projections are einsums over one weight for each head."""

    def __init__(self, d_model: int, heads: int) -> None:
        """Build the four weights: three [heads, d_model, d_head], one [heads, d_head, d_model]."""
        super().__init__()
        d_head = d_model // heads
        self.query = nn.Parameter(torch.randn(heads, d_model, d_head) / d_model**0.5)
        self.key = nn.Parameter(torch.randn(heads, d_model, d_head) / d_model**0.5)
        self.value = nn.Parameter(torch.randn(heads, d_model, d_head) / d_model**0.5)
        self.output = nn.Parameter(torch.randn(heads, d_head, d_model) / d_model**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Attended values, [batch, time, d_model] as they came."""
        query = torch.einsum("btd,hdk->bhtk", x, self.query)
        key = torch.einsum("btd,hdk->bhtk", x, self.key)
        value = torch.einsum("btd,hdk->bhtk", x, self.value)
        weights = torch.einsum("bhtk,bhsk->bhts", query, key).softmax(dim=-1)
        return torch.einsum("bhtk,hkd->btd", torch.einsum("bhts,bhsk->bhtk", weights, value), self.output)


def einsum_attention() -> Example:
    """Two layers of attention written in einsum, and an ordinary head."""
    model = nn.Sequential(
        nn.Linear(5, 12), EinsumAttention(12, 3), nn.LayerNorm(12), EinsumAttention(12, 3), nn.Linear(12, 4)
    )
    return Example(model, token_cross_entropy, torch.randn(3, 5, 5), classes(3, 5, count=4))


MODELS = by_name(
    mlp_mixer,
    vision_transformer,
    transformer_encoder,
    encoder_decoder,
    gpt,
    einsum_attention,
)
