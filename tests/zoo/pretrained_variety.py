"""Vision and speech models of the `transformers` library, built small from a configuration, never downloaded.

Each factory returns one `Example` whose model computes its own loss from the labels among its inputs.
"""

import torch
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from .example import Example, by_name, classes
from .pretrained import VOCABULARY, with_labels


def _images(size: int) -> torch.Tensor:
    """Three random colour images."""
    return torch.randn(3, 3, size, size)


def vit() -> Example:
    """ViT for the classification of images."""
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=4,
        attn_implementation="sdpa",
    )
    return with_labels(ViTForImageClassification(config), pixel_values=_images(8), labels=classes(3, count=4))


def transformers_convnext() -> Example:
    """ConvNeXt with two stages; a larger layer scale than the default, so that every gradient is felt."""
    config = ConvNextConfig(
        patch_size=2,
        num_stages=2,
        hidden_sizes=[12, 16],
        depths=[1, 1],
        layer_scale_init_value=0.5,
        num_labels=4,
    )
    model = ConvNextForImageClassification(config)
    return with_labels(model, pixel_values=_images(12), labels=classes(3, count=4))


def transformers_resnet() -> Example:
    """ResNet with bottleneck layers."""
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1], layer_type="bottleneck", num_labels=4
    )
    model = ResNetForImageClassification(config)
    return with_labels(model, pixel_values=_images(16), labels=classes(3, count=4))


def swin() -> Example:
    """Swin: attention in shifted windows, patches merged between stages."""
    config = SwinConfig(
        image_size=16,
        patch_size=2,
        embed_dim=12,
        depths=[2, 1],
        num_heads=[2, 2],
        window_size=4,
        mlp_ratio=2.0,
        drop_path_rate=0.0,
        num_labels=4,
    )
    return with_labels(
        SwinForImageClassification(config), pixel_values=_images(16), labels=classes(3, count=4)
    )


def wav2vec2() -> Example:
    """Wav2Vec2 on raw waveforms: strided convolutions, a grouped, weight-normed positional one, attention."""
    config = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=[8, 8],
        conv_stride=[4, 2],
        conv_kernel=[8, 3],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=12,
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        apply_spec_augment=False,
        num_labels=4,
        attn_implementation="eager",
    )
    model = Wav2Vec2ForSequenceClassification(config)
    return with_labels(model, input_values=torch.randn(3, 80), labels=classes(3, count=4))


def whisper() -> Example:
    """Whisper: convolutions over a spectrogram, an encoder, a decoder with a tied head."""
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=6,
        d_model=24,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=6,
        max_target_positions=5,
        dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        use_cache=False,
        attn_implementation="eager",
    )
    model = WhisperForConditionalGeneration(config)
    return with_labels(model, input_features=torch.randn(3, 6, 12), labels=classes(3, 5, count=VOCABULARY))


MODELS = by_name(vit, transformers_convnext, transformers_resnet, swin, wav2vec2, whisper)
