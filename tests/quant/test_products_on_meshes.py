"""Products with quantized weights on meshes of eight devices, against one device and numpy in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import expected
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jpt.kernels import local_products
from jpt.kernels.block_quantize import silu_gated
from jpt.kernels.local_products import Pieces, cut, lies
from jpt.quant import producers
from jpt.quant.dot import dot
from jpt.quant.formats import FORMATS, Format
from jpt.quant.producers import Gated, Normed
from jpt.quant.tensors import FakeQuant, quantize
from jpt.sharding.mesh import MeshConfig, make_mesh

B, T, OUT, IN = 8, 2, 256, 512
RNG = np.random.default_rng(5)
# Whole numbers: sums of their squares are exact, in any order.
X, GATE = np.rint(4 * RNG.standard_normal((2, B, T, IN))).astype(np.float32)
SCALE = RNG.uniform(0.5, 2, IN).astype(np.float32)
W = RNG.standard_t(4, (OUT, IN)).astype(np.float32)
DY = RNG.standard_normal((B, T, OUT)).astype(np.float32)
COLUMNS, ROWS = Pieces(out=4), Pieces(inner=4)
ROWS_OF_128 = Format('e4m3', 1, 128)
# How a weight [out, in] lies where its layer is divided so, and x [B, T, in].
LIES = {
    COLUMNS: (P('tensor', 'fsdp'), P(('data', 'fsdp'), 'context')),
    ROWS: (P('fsdp', 'tensor'), P(('data', 'fsdp'), 'context', 'tensor')),
}


def producer(pieces, x, gate, scale):
    """What such a layer reads in a model."""
    return Normed(x, scale, 1e-5) if pieces == COLUMNS else Gated(gate, x, silu_gated)


def run(pieces, form, x, gate, scale, w, dy):
    """The product with a packed weight, its input's codes as numbers, and the gradients through a fake one."""

    def product(x, gate, scale, w):
        return dot(producer(pieces, x, gate, scale), FakeQuant(w, format=form), pieces=pieces)

    given = producer(pieces, x, gate, scale)
    y = dot(given, quantize(w, form), pieces=pieces)
    codes, scales = given.codes(form.scale, lies(x.shape, pieces))
    again, pull = jax.vjp(product, x, gate, scale, w)
    return y, again, codes, scales, pull(dy)


def placed(mesh, pieces):
    """The operands as a mesh holds them."""
    weight, x = LIES[pieces]
    specs = x, x, P(x[2] if len(x) > 2 else None), weight, P(*x[:2], weight[0] if pieces == COLUMNS else None)
    return [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip((X, GATE, SCALE, W, DY), specs, strict=True)
    ]


def error(found, wanted):
    norm = np.linalg.norm(np.asarray(wanted, np.float64))
    return np.linalg.norm(np.asarray(found, np.float64) - wanted) / (norm or 1.0)  # no gradient where nothing is read


@pytest.mark.parametrize(
    ('pieces', 'mesh', 'form'),
    [
        (COLUMNS, MeshConfig(tensor=2, fsdp=2, data=2), 'fp8_block'),
        (COLUMNS, MeshConfig(tensor=2, context=2, fsdp=2), 'fp8_block_ue8m0'),
        (ROWS, MeshConfig(tensor=4, fsdp=2), 'fp8_block'),
        (ROWS, MeshConfig(tensor=2, context=2, data=2), 'fp8_block_ue8m0'),
        (ROWS, MeshConfig(tensor=2, fsdp=4), 'fp8_block_weights'),
        (COLUMNS, MeshConfig(tensor=2, expert=4), 'fp8_block_weights'),
    ],
)
def test_a_mesh_computes_what_one_device_does(pieces, mesh, form, monkeypatch):
    form, used = FORMATS[form], []
    for name in ('block_matmul', 'weight_only_matmul'):
        real = getattr(local_products, name)
        monkeypatch.setattr(
            local_products,
            name,
            lambda *given, real=real: used.append((given[0].shape, jnp.dtype(given[-1]).name)) or real(*given),
        )
    step = jax.jit(partial(run, pieces, form))
    here = step(X, GATE, SCALE, W, DY)
    used.clear()
    devices = make_mesh(mesh)
    with jax.set_mesh(devices):
        there = step(*placed(devices, pieces))
    # On every shard its own rows and inputs; parts of sums are in float32.
    sizes = devices.shape
    rows, columns = B * T * sizes['tensor'] // devices.size, IN // (sizes['tensor'] if pieces == ROWS else 1)
    assert set(used) == {((rows, columns), 'float32')}
    for one, other in zip(here[2:4], there[2:4], strict=True):  # codes and scales of the inputs
        np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))
    np.testing.assert_array_equal(np.asarray(there[0]), np.asarray(there[1]))
    for one, other in zip(jax.tree.leaves((here[0], here[4])), jax.tree.leaves((there[0], there[4])), strict=True):
        assert error(other, one) < 1e-6
    seen = np.asarray(producer(pieces, X, GATE, SCALE).dense(), np.float32).reshape(-1, IN)
    if form.inputs == 'block':
        own = Format('e4m3', 1, 128, form.scale)
        seen = np.concatenate([expected(row[None], own)[-1] for row in seen])
    assert error(there[0], (seen.astype(np.float64) @ expected(W, form)[-1].T).reshape(B, T, OUT)) < 1e-6


@pytest.mark.parametrize('pieces', [COLUMNS, None], ids=('cut', 'unknown'))
def test_what_has_no_kernel_on_shards_is_left_to_the_compiler(pieces, monkeypatch):
    """192 outputs on two shards, or nobody says what lies where: the same numbers, without the kernel."""
    monkeypatch.setattr(local_products, 'block_matmul', None)
    devices, form, w = make_mesh(MeshConfig(tensor=2, data=4)), FORMATS['fp8_block'], W[:192]
    with jax.set_mesh(devices):
        assert cut(lies(X.shape, COLUMNS), 192, IN) == '192 outputs on 2 shards are not whole blocks of 128'
        found = jax.jit(lambda x, w: dot(x, quantize(w, form), pieces=pieces))(X, w)
    seen = np.concatenate([expected(row[None], ROWS_OF_128)[-1] for row in X.reshape(-1, IN)]).astype(np.float64)
    assert error(found.reshape(-1, 192), seen @ expected(w, form)[-1].T) < 1e-6


def test_what_does_not_divide_is_whole_everywhere(monkeypatch):
    """Three heads on two shards, seven rows on four: what lies whole is computed whole, of inputs rounded once."""
    devices, form = make_mesh(MeshConfig(tensor=2, data=4)), FORMATS['fp8_block']
    with jax.set_mesh(devices):
        where = lies((7, T, IN), Pieces(out=3))
        assert (where.inputs, where.weight) == (P(None, None, None), P(None, None))
        found = jax.jit(lambda x, w: dot(x, quantize(w, form), pieces=Pieces(out=3)))(X[:7], W[:192])
    wanted = jax.jit(lambda x, w: dot(x, quantize(w, form)))(X[:7], W[:192])
    assert error(found, wanted) < 1e-6
    calls, real = [], producers.quantize_normed
    monkeypatch.setattr(producers, 'quantize_normed', lambda *given, **more: calls.append(1) or real(*given, **more))

    def readers(x, w):
        given = Normed(x, SCALE, 1e-5)
        return [dot(given, quantize(w, form), pieces=pieces) for pieces in (COLUMNS, Pieces(out=3))]

    with jax.set_mesh(devices):
        jax.eval_shape(readers, X, W)
    assert len(calls) == 1
