"""Gradients by products in eight bits on meshes of eight devices, shard by shard, against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jpt.kernels.local import mesh_axes
from jpt.kernels.local_products import Pieces
from jpt.quant import gradients
from jpt.quant.dot import dot, grouped_dot
from jpt.quant.formats import FORMATS
from jpt.quant.tensors import FakeQuant
from jpt.sharding.mesh import MeshConfig, make_mesh

OUT, IN = 256, 512
RNG = np.random.default_rng(7)
W = RNG.standard_t(4, (OUT, IN)).astype(np.float32)
COLUMNS, ROWS = Pieces(out=4), Pieces(inner=4)
# How a weight [out, in], x [B, T, in] and dy [B, T, out] lie where the layer is divided so.
TOKENS = ('data', 'fsdp'), 'context'
LIES = {
    COLUMNS: (P('tensor', 'fsdp'), P(*TOKENS), P(*TOKENS, 'tensor')),
    ROWS: (P('fsdp', 'tensor'), P(*TOKENS, 'tensor'), P(*TOKENS)),
}


def run(pieces, w, x, dy):
    """dx and dw."""
    return jax.vjp(
        lambda x, w: dot(x, FakeQuant(w, format=FORMATS['fp8_block'], gradients='block'), pieces=pieces), x, w
    )[1](dy)


# Runs of tokens: one short one per row; two whole ones, one to a shard.
@pytest.mark.parametrize(
    ('pieces', 'mesh', 'shape', 'operand'),
    [
        (COLUMNS, MeshConfig(tensor=2, fsdp=2, data=2), (8, 24), (OUT // 2, 8 // 4 * 128)),
        (ROWS, MeshConfig(tensor=2, fsdp=2, context=2), (4, 256), (OUT, 4 // 2 * 128)),
    ],
    ids=('outputs', 'inputs'),
)
def test_shards_multiply_what_they_have(pieces, mesh, shape, operand, monkeypatch):
    """As on Hopper, with what each kernel computes by its reference; on one device as a product of the numbers."""
    x, dy = (RNG.standard_normal((*shape, width)).astype(np.float32) for width in (IN, OUT))
    wanted = jax.jit(run, static_argnums=0)(pieces, *map(jnp.asarray, (W, x, dy)))
    used, product = [], gradients.block_matmul
    monkeypatch.setattr(gradients, 'block_matmul', lambda *given: used.append(given[0].shape) or product(*given))
    monkeypatch.setattr(gradients, 'reason_not_hopper', lambda: None)
    devices = make_mesh(mesh)
    arrays = [jax.device_put(a, NamedSharding(devices, p)) for a, p in zip((W, x, dy), LIES[pieces], strict=True)]
    with jax.set_mesh(devices):
        found = jax.jit(run, static_argnums=0)(pieces, *arrays)
    assert used == [operand]  # outputs by tokens of a shard, for the gradient of the weight
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-4)


def test_experts_are_multiplied_alike_on_all_devices(monkeypatch):
    """Where no mixture has divided them (its shard_map does, tests/sharding/test_kernel_meshes.py)."""

    @jax.jit
    def run(x, w, dy):
        sizes = jnp.asarray([130, 0, 60], jnp.int32)
        fake = FakeQuant(w, format=FORMATS['fp8_block'], gradients='block')
        dx, dfake = jax.vjp(lambda x, fake: grouped_dot(x, fake, sizes), x, fake)[1](dy)
        return dx, dfake.weight

    w = RNG.standard_t(4, (3, OUT, IN)).astype(np.float32)
    x, dy = (RNG.standard_normal((200, width)).astype(np.float32) for width in (IN, OUT))
    wanted = run(x, w, dy)
    used, product = [], gradients.group_block_product

    def spy(*given):
        used.append((given[0].shape, mesh_axes(AxisType.Auto)))
        return product(*given)

    monkeypatch.setattr(gradients, 'group_block_product', spy)
    monkeypatch.setattr(gradients, 'reason_not_hopper', lambda: None)
    with jax.set_mesh(make_mesh(MeshConfig(tensor=2, fsdp=2, data=2))):
        found = run(x, w, dy)
    # 200 rows of three groups are at most four runs; nothing is left to the compiler, which would gather for a kernel.
    assert used == [((OUT, 4 * 128), {})]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-4)
