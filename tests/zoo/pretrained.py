"""Language models of the `transformers` library, built small from a configuration and never downloaded.

Each factory returns one `Example` whose inputs are keywords that hold the labels: the model's output carries
its loss, so `loss_fn` and `targets` are None.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    RobertaConfig,
    RobertaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from .example import Example, by_name, classes

VOCABULARY = 32


def with_labels(model: PreTrainedModel, **inputs: Tensor) -> Example:
    """An example whose model computes its own loss."""
    return Example(model.train(), None, inputs, None)


def _causal(model: PreTrainedModel) -> Example:
    """A causal language model with three sequences of six tokens, which are also the labels."""
    tokens = classes(3, 6, count=VOCABULARY)
    return with_labels(model, input_ids=tokens, labels=tokens.clone())


def gpt2() -> Example:
    """GPT-2: `Conv1D` layers (weight [d_in, d_out]) and a tied head."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=6,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation="eager",
    )
    return _causal(GPT2LMHeadModel(config))


def _decoder_sizes() -> dict[str, Any]:
    """The sizes that Llama and its relatives share."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }


def transformers_llama() -> Example:
    """Llama with grouped-query attention."""
    return _causal(LlamaForCausalLM(LlamaConfig(**_decoder_sizes())))


def mixtral() -> Example:
    """Mixtral: each token's experts gathered, then one batched product (grouped_mm has no float64 kernel)."""
    config = MixtralConfig(**_decoder_sizes(), num_local_experts=4, num_experts_per_tok=2)
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("batched_mm")
    return _causal(model)


def qwen_moe() -> Example:
    """Qwen2-MoE: gathered experts as in Mixtral, and a gated expert that every token shares."""
    config = Qwen2MoeConfig(
        **_decoder_sizes(),
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=16,
    )
    model = Qwen2MoeForCausalLM(config)
    model.set_experts_implementation("batched_mm")
    return _causal(model)


def mamba() -> Example:
    """Mamba, by its path of plain PyTorch operations."""
    config = MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        state_size=4,
        num_hidden_layers=2,
        expand=2,
        time_step_rank=2,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return _causal(MambaForCausalLM(config))


def _encoder_sizes() -> dict[str, Any]:
    """The sizes that BERT and its relatives share."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 10,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": "eager",
    }


def _attention_mask() -> Tensor:
    """Three sequences of lengths six, four and five."""
    return (torch.arange(6) < torch.tensor([[6], [4], [5]])).long()


def bert() -> Example:
    """BERT for the classification of sequences, with padding."""
    model = BertForSequenceClassification(BertConfig(**_encoder_sizes(), num_labels=3))
    tokens = classes(3, 6, count=VOCABULARY)
    return with_labels(model, input_ids=tokens, attention_mask=_attention_mask(), labels=classes(3, count=3))


def roberta() -> Example:
    """RoBERTa for the classification of tokens."""
    model = RobertaForTokenClassification(RobertaConfig(**_encoder_sizes(), num_labels=4))
    tokens = classes(3, 6, count=VOCABULARY - 2) + 2
    return with_labels(model, input_ids=tokens, labels=classes(3, 6, count=4))


def distilbert() -> Example:
    """DistilBERT for several independent labels."""
    config = DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=24,
        hidden_dim=48,
        n_layers=2,
        n_heads=2,
        max_position_embeddings=6,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        num_labels=3,
        problem_type="multi_label_classification",
        attn_implementation="sdpa",
    )
    labels = classes(3, 3, count=2).float()
    model = DistilBertForSequenceClassification(config)
    return with_labels(model, input_ids=classes(3, 6, count=VOCABULARY), labels=labels)


def albert() -> Example:
    """ALBERT: one layer's parameters used by both layers; masked tokens, some labels ignored."""
    config = AlbertConfig(**_encoder_sizes(), embedding_size=12)
    tokens = classes(3, 6, count=VOCABULARY)
    labels = tokens.masked_fill(torch.arange(6) % 3 == 2, -100)
    return with_labels(AlbertForMaskedLM(config), input_ids=tokens, labels=labels)


def t5() -> Example:
    """T5: one token table for encoder, decoder and head; relative positions, gated network."""
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        initializer_factor=0.5,
        feed_forward_proj="gated-gelu",
        use_cache=False,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    return with_labels(
        model, input_ids=classes(3, 6, count=VOCABULARY), labels=classes(3, 4, count=VOCABULARY)
    )


def bart() -> Example:
    """BART: encoder and decoder on one token table, which is also the head."""
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=24,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=8,
        dropout=0.0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = BartForConditionalGeneration(config)
    tokens = classes(3, 6, count=VOCABULARY)
    return with_labels(model, input_ids=tokens, labels=classes(3, 4, count=VOCABULARY))


MODELS = by_name(
    gpt2, transformers_llama, mixtral, qwen_moe, mamba, bert, roberta, distilbert, albert, t5, bart
)
