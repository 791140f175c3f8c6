"""The feed-forward part of a layer."""

from collections.abc import Callable

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from jpt.models.config import ModelConfig
from jpt.models.layers import Linear, recomputed

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'silu': jax.nn.silu,
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
    'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
    'relu': jax.nn.relu,
    'tanh': jax.numpy.tanh,
}


class MLP(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)) where the family has no gate. [B, T, D] -> [B, T, D]."""

    cfg: ModelConfig
    width: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        cfg = self.cfg
        activation = ACTIVATIONS[cfg.activation]
        up_BTF = checkpoint_name(Linear(self.width, cfg.mlp_bias, name='up')(x_BTD), 'mlp_up')
        if cfg.gated_mlp:
            gate_BTF = checkpoint_name(Linear(self.width, cfg.mlp_bias, name='gate')(x_BTD), 'mlp_gate')
            inner_BTF = recomputed(lambda gate, up: activation(gate) * up)(gate_BTF, up_BTF)
        else:
            inner_BTF = recomputed(activation)(up_BTF)
        return Linear(cfg.width, cfg.mlp_bias, (2 * cfg.num_layers) ** -0.5, name='down')(inner_BTF)
