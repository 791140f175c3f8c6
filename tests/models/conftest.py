"""A small model with everything that layers can differ in: two rope bases, windows, a remainder, post norms, biases."""

import jax
import pytest

from jpt.models.config import LayerKind, ModelConfig, Rope, runs_of
from jpt.models.transformer import init


@pytest.fixture(scope='session')
def mixed() -> ModelConfig:
    """Seven layers of period three: local, local, global, local, local, global, local."""
    local, whole = LayerKind(Rope(1e4), 5, 24), LayerKind(Rope(1e6, 'linear', 8.0), None, 24)
    kinds = tuple(whole if (i + 1) % 3 == 0 else local for i in range(7))
    return ModelConfig(
        family='gemma3_text',
        vocab_size=61,
        width=20,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        segments=runs_of(kinds),
        max_length=64,
        activation='gelu_tanh',
        norm_offset=1.0,
        post_norms=True,
        qk_norm=True,
        logit_soft_cap=3.0,
        attention_soft_cap=4.0,
        embed_scale=20**0.5,
        tied=True,
    )


@pytest.fixture(scope='session')
def mixed_params(mixed):
    """Parameters whose norms are not at their initial value, so that each of them matters."""
    params = init(mixed, jax.random.key(1))
    keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), params)
