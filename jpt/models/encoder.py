"""What a bidirectional encoder has beside its layers: token types and a norm on its embeddings, and its heads (BERT).

Devlin et al. 2018, sections 3 and 3.1. Training such a model is not one of jpt's tasks; its outputs are differentiable.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpt.models.config import ModelConfig
from jpt.models.layers import Linear, norm
from jpt.models.mlp import ACTIVATIONS

Params = dict[str, Any]


def init_encoder(cfg: ModelConfig, key: jax.Array) -> Params:
    """The parameters that only an encoder has."""
    encoder = cfg.encoder
    assert encoder is not None
    keys = jax.random.split(key, 4)
    row, std = jnp.zeros((1, cfg.width)), cfg.width**-0.5

    def fresh(module: nn.Module, index: int) -> Any:
        return module.init(keys[index], row)['params']

    params: Params = {
        'token_types': {'embedding': std * jax.random.normal(keys[0], (encoder.token_types, cfg.width), jnp.float32)},
        'embed_norm': fresh(_norm(cfg), 0),
        'mlm': {
            'dense': fresh(_dense(cfg), 1),
            'norm': fresh(_norm(cfg), 1),
            'output': {'bias': jnp.zeros(cfg.vocab_size)},
        },
    }
    if encoder.pooled:
        params['pooler'] = {'dense': fresh(_dense(cfg), 2)}
        params['next_sentence'] = {'dense': fresh(Linear(2, True, parent=None), 3)}
    return params


def _norm(cfg: ModelConfig) -> nn.Module:
    return norm(cfg, 'norm').clone(parent=None, name=None)


def _dense(cfg: ModelConfig) -> nn.Module:
    return Linear(cfg.width, True, parent=None)


def _applied(module: nn.Module, params: Params, x: jax.Array) -> jax.Array:
    apply: Callable[..., Any] = module.apply
    return apply({'params': params}, x)


def normed_embeddings(
    cfg: ModelConfig, params: Params, hidden_BTD: jax.Array, token_types_BT: jax.Array | None
) -> jax.Array:
    """The embeddings with those of their token types (0 where none are given), normalized."""
    table = params['token_types']['embedding'].astype(hidden_BTD.dtype)
    typed = table[:1][None] if token_types_BT is None else jnp.take(table, token_types_BT, axis=0)
    return _applied(_norm(cfg), params['embed_norm'], hidden_BTD + typed)


def masked_words(cfg: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """The hidden states [..., D] whose products with the embeddings are the logits of masked words, but for a bias."""
    inner = _applied(_dense(cfg), params['mlm']['dense'], hidden)
    return _applied(_norm(cfg), params['mlm']['norm'], ACTIVATIONS[cfg.activation](inner))


def pooled(cfg: ModelConfig, params: Params, hidden_BTD: jax.Array) -> jax.Array:
    """A summary of each row [B, D], from its first token.

    Raises:
        ValueError: the checkpoint has no pooler.
    """
    if cfg.encoder is None or not cfg.encoder.pooled:
        raise ValueError('this model has no pooler: expected an encoder whose checkpoint has a pooler')
    return jnp.tanh(_applied(_dense(cfg), params['pooler']['dense'], hidden_BTD[:, 0]))


def next_sentence(cfg: ModelConfig, params: Params, hidden_BTD: jax.Array) -> jax.Array:
    """Logits [B, 2] of whether the second text of a row follows the first (index 0) or not.

    Raises:
        ValueError: as `pooled`.
    """
    summary_BD = pooled(cfg, params, hidden_BTD)
    return _applied(Linear(2, True, parent=None), params['next_sentence']['dense'], summary_BD)
