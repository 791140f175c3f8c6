"""What the backward pass keeps of a layer: counts that are known beforehand."""

import collections

import jax
import jax.numpy as jnp
import pytest

from jpt.models.attention import Where
from jpt.models.block import apply_block
from jpt.models.config import Compute, LayerKind, ModelConfig, Rope, runs_of
from jpt.models.layers import LayerNorm, RMSNorm
from jpt.models.mlp import MLP
from jpt.models.transformer import init, locate

WIDTH, INNER = 16, 40
B, T = 2, 8


def config(**more):
    kind = LayerKind(Rope(), None, INNER)
    return ModelConfig(
        family='llama',
        vocab_size=32,
        width=WIDTH,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_length=T,
        segments=runs_of((kind,)),
        **more,
    )


def kept(function, *args):
    """Arrays that the backward pass of a function gets from its forward pass, as a counter of (dtype, shape)."""
    pull = jax.eval_shape(lambda *a: jax.vjp(function, *a)[1], *args)
    return collections.Counter((leaf.dtype.name, leaf.shape) for leaf in jax.tree.leaves(pull))


@pytest.mark.parametrize('norm', [RMSNorm(1e-6), LayerNorm(1e-6)], ids=['rms', 'layer'])
def test_a_norm_keeps_its_input_in_its_own_dtype(norm):
    x = jax.ShapeDtypeStruct((B, T, WIDTH), jnp.bfloat16)
    params = jax.eval_shape(norm.init, jax.random.key(0), x)
    assert kept(norm.apply, params, x) == {('bfloat16', (B, T, WIDTH)): 1, ('float32', (WIDTH,)): 1}  # x, scale


@pytest.mark.parametrize(('gated', 'wide'), [(True, 3), (False, 2)])
def test_an_mlp_keeps_the_operands_of_its_products(gated, wide):
    """x, what each product gave, and what the last one took."""
    mlp = MLP(config(gated_mlp=gated), INNER)
    x = jax.ShapeDtypeStruct((B, T, WIDTH), jnp.float32)
    params = jax.eval_shape(mlp.init, jax.random.key(0), x)
    found = kept(mlp.apply, params, x)
    assert found[('float32', (B, T, INNER))] == wide
    assert found[('float32', (B, T, WIDTH))] == 1


def products(jaxpr):
    """Number of matrix products in a program, those of inner programs included."""
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name == 'dot_general'
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')):
            inner = getattr(inner, 'jaxpr', inner)
            count += products(inner) if hasattr(inner, 'eqns') else 0
    return count


def test_remat_dots_makes_no_product_of_a_kernel_twice():
    """Seven kernels: 7 products forward and 14 backward; 'full' makes again the six whose results are asked for."""
    cfg = config()
    layer = jax.tree.map(lambda leaf: leaf[0], init(cfg, jax.random.key(0))['layers'][0][0])
    x = jnp.zeros((B, T, WIDTH))
    places = jnp.broadcast_to(jnp.arange(T), (B, T))
    where: Where = locate(cfg, places, jnp.ones_like(places), 'float32')

    def count(remat):
        block = apply_block(cfg, cfg.segments[0].kinds[0], Compute(remat=remat, attention='dense'))
        program = jax.make_jaxpr(jax.grad(lambda p, x: block(p, x, where)[0].sum(), (0, 1)))(layer, x)
        return products(program.jaxpr)

    attention = 2 + 4  # of scores and values, forward and backward; made once more under both policies
    assert count('none') == 21 + attention
    assert count('dots') == 21 + attention + 2
    assert count('full') == 21 + attention + 2 + 6
