"""Transformer Engine as far as it goes without one: what is said where it is absent, and what it would be handed."""

import contextlib
import sys
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpt.kernels.te import _without_meshes, require
from jpt.quant.dot import dot, grouped_dot
from jpt.quant.formats import FORMATS
from jpt.quant.recipes import in_training
from jpt.quant.tensors import FakeQuant
from jpt.training.settings import FakeQuantConfig

MODULES = ('', '.common', '.common.recipe', '.jax', '.jax.dense', '.jax.quantize', '.jax.sharding')


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformer_engine', None)


def test_what_to_install_is_said(absent):
    for call in (require, lambda: in_training({}, {}, 'te')):
        with pytest.raises(ImportError, match=r"pip install 'jpt\[te\]'.*no recipe of blocks.*gradients='block'"):
            call()


def test_blocks_are_refused_when_a_job_is_described():
    with pytest.raises(
        ValueError, match=r'gradients.*te.*expected fp8_tensor \(Transformer Engine has for JAX no recipe'
    ):
        FakeQuantConfig((('layers/**', 'fp8_block'),), gradients='te', result='weights')
    with pytest.raises(ValueError, match="'weights' with gradients='te'"):
        FakeQuantConfig((('layers/**', 'fp8_tensor'),), gradients='te')
    FakeQuantConfig((('layers/**', 'fp8_tensor'),), gradients='te', result='weights')


@pytest.fixture
def stand_in(monkeypatch):
    """Modules with the two functions that are called, and what they were called with."""
    modules = {name: ModuleType(f'transformer_engine{name}') for name in MODULES}
    calls = []

    def dense(x, kernel, contracting_dims, quantizer_set):
        calls.append((kernel.shape, kernel.dtype, quantizer_set))
        return jax.lax.dot_general(x, kernel, (contracting_dims, ((), ())))

    modules['.common.recipe'].Float8CurrentScaling = lambda: 'current'
    modules['.jax.dense'].dense = dense
    modules['.jax.quantize'].QuantizerFactory = SimpleNamespace(create_set=lambda fp8_recipe: fp8_recipe)
    modules['.jax.sharding'].MeshResource = lambda: 'no mesh'
    modules['.jax.sharding'].global_shard_guard = lambda resource: contextlib.nullcontext(calls.append(resource))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f'transformer_engine{name}', module)
    _without_meshes.cache_clear()
    yield calls
    _without_meshes.cache_clear()


def test_a_product_is_handed_over(stand_in):
    random = np.random.default_rng(0)
    x, w = random.standard_normal((2, 3, 8)).astype(np.float32), random.standard_normal((5, 8)).astype(np.float32)
    fake = FakeQuant(jnp.asarray(w), format=FORMATS['fp8_tensor'], gradients='te')
    np.testing.assert_allclose(dot(jnp.asarray(x), fake), x @ w.T, rtol=1e-5, atol=1e-5)
    dfake = jax.grad(lambda fake: dot(jnp.asarray(x), fake).sum())(fake)
    np.testing.assert_allclose(dfake.weight, np.tile(x.sum((0, 1)), (5, 1)), rtol=1e-5, atol=1e-5)
    assert dot(jnp.asarray(x, jnp.bfloat16), fake).dtype == jnp.bfloat16
    assert stand_in[:2] == ['no mesh', ((8, 5), jnp.float32, 'current')]
    assert stand_in.count('no mesh') == 1
    assert stand_in[-1] == ((8, 5), jnp.bfloat16, 'current')


def test_experts_and_meshes_are_refused(stand_in):
    fake = FakeQuant(jnp.ones((2, 4, 4)), format=FORMATS['fp8_tensor'], gradients='te')
    with pytest.raises(ValueError, match="experts with gradients='te': expected 'tensor'"):
        grouped_dot(jnp.ones((3, 4)), fake, jnp.array([1, 2], jnp.int32))
    one = FakeQuant(jnp.ones((4, 4)), format=FORMATS['fp8_tensor'], gradients='te')
    x, mesh = jnp.ones((3, 4)), jax.sharding.AbstractMesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(ValueError, match=r"on a mesh \{'data': 2\}: expected one device"),
    ):
        jax.eval_shape(dot, x, one)
