"""The feed-forward part of a layer."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jpt.kernels.block_quantize import silu_gated
from jpt.kernels.local_products import Pieces
from jpt.models.config import ModelConfig
from jpt.models.layers import Linear
from jpt.quant.producers import Deferred, Gated, Given, recomputed

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'silu': jax.nn.silu,
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
    'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
    'relu': jax.nn.relu,
    'relu2': lambda x: jnp.square(jax.nn.relu(x)),
    'tanh': jnp.tanh,
}


def gated_unit(cfg: ModelConfig) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """What the model makes of gate and up, in their dtype."""
    activation, clamped = ACTIVATIONS[cfg.activation], cfg.clamped_gate
    if clamped is None:
        return silu_gated if cfg.activation == 'silu' else lambda gate, up: activation(gate) * up

    def unit(gate: jax.Array, up: jax.Array) -> jax.Array:
        gate, up = jnp.minimum(gate, clamped.limit), jnp.clip(up, -clamped.limit, clamped.limit)
        return (up + 1) * gate * jax.nn.sigmoid(clamped.alpha * gate)

    return unit


class MLP(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)) where the family has no gate. [B, T, D] -> [B, T, D]."""

    cfg: ModelConfig
    width: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array | Deferred) -> jax.Array:
        cfg, wide = self.cfg, Pieces(out=self.width)
        up_BTF = checkpoint_name(Linear(self.width, cfg.mlp_bias, pieces=wide, name='up')(x_BTD), 'mlp_up')
        inner_BTF: Deferred
        if cfg.gated_mlp:
            gate_BTF = checkpoint_name(Linear(self.width, cfg.mlp_bias, pieces=wide, name='gate')(x_BTD), 'mlp_gate')
            inner_BTF = Gated(gate_BTF, up_BTF, gated_unit(cfg))
        else:
            inner_BTF = Given(recomputed(ACTIVATIONS[cfg.activation])(up_BTF))
        scale, narrow = (2 * cfg.num_layers) ** -0.5, Pieces(inner=self.width)
        return Linear(cfg.width, cfg.mlp_bias, scale, narrow, name='down')(inner_BTF)
