"""What linear layers say of their pieces is what the rules divide their weights by."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from sharded_steps import MODELS as SMALL

from jpt.kernels.local_products import Pieces
from jpt.models.block import Block
from jpt.models.config import Compute, Latent, LayerKind, ModelConfig, Rope, Segment
from jpt.models.layers import Linear
from jpt.models.transformer import locate
from jpt.sharding.rules import MESH_AXES, Units, logical_axes, units_of

LATENT = ModelConfig(
    'deepseek_v3', 53, 24, 4, 4, 9, (Segment((LayerKind(Rope(), None, 20),), 1),), 64, latent=Latent(7, 11, 5, 4, 8)
)
MODELS = {
    **SMALL,
    'latent': LATENT,
    'latent without queries': dataclasses.replace(LATENT, latent=dataclasses.replace(LATENT.latent, query_rank=None)),
}


def pieces_of(cfg, path, shape):
    """What the rules may divide over `tensor` of a weight: heads or groups whole, else single channels."""

    def pieces(axis, size):
        if axis is None or 'tensor' not in MESH_AXES[axis]:
            return 0
        return getattr(units_of(cfg), axis) if axis in Units._fields else size

    return Pieces(*(pieces(axis, size) for axis, size in zip(logical_axes((*path, 'kernel')), shape, strict=True)))


@pytest.mark.parametrize('name', MODELS)
def test_pieces_are_those_of_the_rules(name):
    cfg, found = MODELS[name], {}

    def look(call, args, kwargs, context):
        if isinstance(context.module, Linear) and context.method_name == '__call__':
            module, x = context.module, args[0]
            found[module.path] = module.pieces, (module.features, x.shape[-1])
        return call(*args, **kwargs)

    where = locate(cfg, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32), 'float32')
    for kind in {kind for segment in cfg.segments for kind in segment.kinds}:
        block = Block(cfg, kind, Compute(attention='dense'), parent=None)
        with nn.intercept_methods(look):
            jax.eval_shape(block.init, jax.random.key(0), jnp.zeros((1, 1, cfg.width)), where)
    assert found
    for path, (pieces, shape) in found.items():
        assert pieces == pieces_of(cfg, path, shape), path
