"""BERT: an encoder, with the heads it was pretrained with."""

import dataclasses
from collections.abc import Collection
from typing import Any

from jpt.models.config import Encoder, LayerKind, ModelConfig, runs_of
from jpt.models.families.dialect import Dialect
from jpt.models.families.family import Family
from jpt.models.families.fields import ACTIVATION_NAMES, Fields

BERT_DIALECT = Dialect(
    embed='bert.embeddings.word_embeddings',
    layer_prefix='bert.encoder.layer',
    layer={
        'attn.q': 'attention.self.query',
        'attn.k': 'attention.self.key',
        'attn.v': 'attention.self.value',
        'attn.out': 'attention.output.dense',
        'attn_norm': 'attention.output.LayerNorm',
        'mlp.up': 'intermediate.dense',
        'mlp.down': 'output.dense',
        'mlp_norm': 'output.LayerNorm',
    },
    final_norm='',
    positions='bert.embeddings.position_embeddings',
    ends={
        'token_types': 'bert.embeddings.token_type_embeddings',
        'embed_norm': 'bert.embeddings.LayerNorm',
        'mlm.dense': 'cls.predictions.transform.dense',
        'mlm.norm': 'cls.predictions.transform.LayerNorm',
        'mlm.output': 'cls.predictions',
        'pooler.dense': 'bert.pooler.dense',
        'next_sentence.dense': 'cls.seq_relationship',
    },
    head='cls.predictions.decoder',
    untied={'mlm.output': 'cls.predictions.decoder'},
    older=((r'LayerNorm\.gamma$', 'LayerNorm.weight'), (r'LayerNorm\.beta$', 'LayerNorm.bias')),
    twins={'cls.predictions.bias': 'cls.predictions.decoder.bias'},
)
POOLED = 'BertForPreTraining'
POOLED_NAMES = ('bert.pooler.', 'cls.seq_relationship.')


def _read(fields: Fields) -> ModelConfig:
    fields.expect('position_embedding_type', ('absolute',))
    fields.expect('add_cross_attention', (False,))
    fields.expect('is_decoder', (False,))
    fields.expect('directionality', ('bidi',))
    fields.ignore('attention_probs_dropout_prob', 'hidden_dropout_prob', 'classifier_dropout')
    # The first releases say what their pooler is made of; there has been one kind of it.
    fields.ignore('pooler_fc_size', 'pooler_num_attention_heads', 'pooler_num_fc_layers', 'pooler_size_per_head')
    fields.ignore('pooler_type')
    width, heads = fields.integer('hidden_size', 768), fields.integer('num_attention_heads', 12)
    if width % heads:
        raise ValueError(f'config.json: hidden_size={width}: expected a multiple of num_attention_heads={heads} (bert)')
    mlp_width = fields.integer('intermediate_size', 3072)
    return ModelConfig(
        family='bert',
        vocab_size=fields.integer('vocab_size', 30522),
        width=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        segments=runs_of((LayerKind(mlp_width=mlp_width),) * fields.integer('num_hidden_layers', 12)),
        max_length=fields.integer('max_position_embeddings', 512),
        activation=fields.choice('hidden_act', ACTIVATION_NAMES, 'gelu'),
        gated_mlp=False,
        norm='layer',
        norm_eps=fields.number('layer_norm_eps', 1e-12),
        pre_norms=False,
        residual_norms=True,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        learned_positions=True,
        tied=fields.boolean('tie_word_embeddings', True),
        causal=False,
        encoder=Encoder(fields.integer('type_vocab_size', 2), POOLED in (fields.get('architectures') or ())),
    )


def _completed(cfg: ModelConfig, names: Collection[str]) -> ModelConfig:
    """Published checkpoints hold the pooler and its head whatever architecture their configs name."""
    if cfg.encoder is None or not any(name.startswith(POOLED_NAMES) for name in names):
        return cfg
    return dataclasses.replace(cfg, encoder=dataclasses.replace(cfg.encoder, pooled=True))


def _write(cfg: ModelConfig) -> dict[str, Any]:
    encoder = cfg.encoder
    assert encoder is not None
    return {
        'architectures': [POOLED if encoder.pooled else BERT.architecture],
        'vocab_size': cfg.vocab_size,
        'hidden_size': cfg.width,
        'intermediate_size': next(cfg.layer_kinds()).mlp_width,
        'num_hidden_layers': cfg.num_layers,
        'num_attention_heads': cfg.num_heads,
        'max_position_embeddings': cfg.max_length,
        'type_vocab_size': encoder.token_types,
        'hidden_act': 'gelu_new' if cfg.activation == 'gelu_tanh' else cfg.activation,
        'layer_norm_eps': cfg.norm_eps,
        'tie_word_embeddings': cfg.tied,
    }


BERT = Family('BertForMaskedLM', _read, _write, BERT_DIALECT, _completed)
