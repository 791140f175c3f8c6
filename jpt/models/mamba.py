"""Mamba-2's mixer: a causal convolution, a state space with a step size per head, and a gated norm.

Dao and Gu 2024, section 7. The maps that a checkpoint holds in one tensor are apart here, so that each may be divided
over devices by its heads or groups.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jpt.kernels.causal_conv import ConvTail, causal_conv
from jpt.kernels.local_products import Pieces
from jpt.kernels.ssd import SsdState, ssd
from jpt.models.attention import Where
from jpt.models.cache import LayerCache, Recurrent
from jpt.models.config import Compute, LayerKind, ModelConfig, StateSpace
from jpt.models.layers import Linear, along_last
from jpt.models.mlp import ACTIVATIONS
from jpt.quant.producers import Deferred, recomputed


class Channels(NamedTuple):
    """What the convolution runs over: the inputs of the heads, and what enters and what reads the states."""

    x: jax.Array  # [B, T, N * P]
    b: jax.Array  # [B, T, G * Z]
    c: jax.Array  # [B, T, G * Z]


class Conv(nn.Module):
    """A causal filter per channel, then the activation. [B, T, C] -> [B, T, C], and the tail for what follows."""

    space: StateSpace

    @nn.compact
    def __call__(self, x_BTC: jax.Array, segments_BT: jax.Array, tail: ConvTail | None) -> tuple[jax.Array, ConvTail]:
        space, channels = self.space, x_BTC.shape[-1]
        # As convolutions are stored: (out, in per group, width).
        taps = self.param('filter', nn.initializers.normal(space.conv_width**-0.5), (channels, 1, space.conv_width))
        bias = self.param('bias', nn.initializers.zeros, (channels,)) if space.conv_bias else None
        y_BTC, tail = causal_conv(x_BTC, taps[:, 0], bias, segments_BT, tail)
        return recomputed(ACTIVATIONS[space.activation])(y_BTC), tail


class GatedNorm(nn.Module):
    """RMS norm of x * silu(gate) within each of `groups` runs of channels, times a scale."""

    groups: int
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))

        def normed(x: jax.Array, gate: jax.Array, scale: jax.Array) -> jax.Array:
            wide = jnp.promote_types(x.dtype, jnp.float32)
            gated = x.astype(wide) * jax.nn.silu(gate.astype(wide))
            runs = gated.reshape(*gated.shape[:-1], self.groups, -1)
            runs = runs * jax.lax.rsqrt(jnp.mean(jnp.square(runs), axis=-1, keepdims=True) + self.eps)
            whole = runs.reshape(gated.shape)
            return (whole * along_last(scale.astype(wide), whole)).astype(x.dtype)

        return recomputed(normed)(x, gate, scale)


class Mamba(nn.Module):
    """[B, T, D] -> [B, T, D], and the cache with the state after these tokens."""

    cfg: ModelConfig
    kind: LayerKind
    compute: Compute

    @nn.compact
    def __call__(self, x_BTD: Deferred, where: Where, cache: LayerCache | None) -> tuple[jax.Array, LayerCache | None]:
        cfg, space = self.cfg, self.cfg.state_space
        assert space is not None
        held: Recurrent | None = None if cache is None else cache.read()
        tails = {} if held is None else {'x': held.tail_x, 'b': held.tail_b, 'c': held.tail_c}
        heads, grouped = space.num_heads, space.groups * space.state_dim

        def linear(name: str, width: int, pieces: int) -> jax.Array:
            return Linear(width, space.bias, pieces=Pieces(out=pieces), name=name)(x_BTD)

        gate_BTI = checkpoint_name(linear('gate', space.width, heads), 'mlp_gate')
        inputs = Channels(
            linear('x', space.width, heads),
            linear('b', grouped, space.groups),
            linear('c', grouped, space.groups),
        )
        convs = [
            Conv(space, name=f'conv_{name}')(
                values, where.segments_BT, None if held is None else ConvTail(tails[name], held.segment_B)
            )
            for name, values in inputs._asdict().items()
        ]
        mixed_BTI, state = self._scan(Channels(*(y for y, _ in convs)), linear('dt', heads, heads), where, held)
        if cache is not None:
            x, b, c = (tail.inputs_BWC for _, tail in convs)
            cache = cache.write(Recurrent(x, b, c, state.state_BNPZ, state.segment_B))
        normed_BTI = GatedNorm(space.groups, cfg.norm_eps, name='norm')(mixed_BTI, gate_BTI)
        scale = (2 * cfg.num_layers) ** -0.5
        return Linear(cfg.width, space.bias, scale, Pieces(inner=heads), name='out')(normed_BTI), cache

    def _scan(
        self, inputs: Channels, dt_BTN: jax.Array, where: Where, held: Recurrent | None
    ) -> tuple[jax.Array, SsdState]:
        """The state space, [B, T, N * P], and the state after the last token."""
        space = self.cfg.state_space
        assert space is not None
        heads, batch, length = space.num_heads, *inputs.x.shape[:2]
        wide = jnp.promote_types(inputs.x.dtype, jnp.float32)

        def per_head(name: str, init: Any) -> jax.Array:
            return self.param(name, init, (heads,)).astype(wide)

        a_N = -jnp.exp(per_head('a_log', _log_of_numbers))
        dt_BTN = jax.nn.softplus(dt_BTN.astype(wide) + per_head('dt_bias', _inverse_softplus_of_steps)[None, None])
        dt_BTN = jnp.clip(dt_BTN, *space.steps)
        x_BTNP = self.compute.place(
            inputs.x.reshape(batch, length, heads, space.head_dim), ('batch', 'length', 'heads', None)
        )
        b_BTGZ, c_BTGZ = (y.reshape(batch, length, space.groups, space.state_dim) for y in (inputs.b, inputs.c))
        state = None if held is None else SsdState(held.state_BNPZ, held.segment_B)
        y_BTNP, new = ssd(x_BTNP, dt_BTN, a_N, b_BTGZ, c_BTGZ, where.segments_BT, state)
        skip_N = per_head('skip', nn.initializers.ones)
        y_BTNP = (y_BTNP.astype(wide) + skip_N[None, None, :, None] * x_BTNP.astype(wide)).astype(x_BTNP.dtype)
        return checkpoint_name(y_BTNP.reshape(batch, length, space.width), 'attention'), new


def _log_of_numbers(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """log 1, log 2, ...: decay rates as Mamba-2 starts with."""
    del key
    return jnp.log(jnp.arange(1, shape[0] + 1, dtype=jnp.float32))


def _inverse_softplus_of_steps(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Step sizes drawn evenly in their logarithm between 0.001 and 0.1, as what softplus makes them of."""
    step = jnp.exp(jax.random.uniform(key, shape, minval=math.log(0.001), maxval=math.log(0.1)))
    return step + jnp.log(-jnp.expm1(-step))
