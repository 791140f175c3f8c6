"""Generation on a mesh: the golden texts, where the cache lies, and that no token sends a state between devices."""

import dataclasses
import math
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpt
from jpt.generation import engine
from jpt.generation.placement import place_cache
from jpt.models.cache import Cache, KeysValues, Latents, Recurrent, init_cache
from jpt.models.config import LayerKind, ModelConfig, Segment, StateSpace
from jpt.sharding.audit import collectives
from jpt.sharding.layout import make_layout, to_device_layout
from jpt.sharding.mesh import MeshConfig, make_mesh
from jpt.sharding.rules import Rules, param_specs, path_keys, shardings, units_of

MODELS = pathlib.Path(__file__).parents[1] / 'golden' / 'models'
ROWS = ('data', 'expert')


class Decoding(NamedTuple):
    """What a decoding program was given, and its compiled text."""

    cache: Cache
    text: str


@pytest.fixture
def decoded(monkeypatch):
    """The decoding programs that `generate` runs."""
    found = []
    decode = engine.decode

    def recorded(program, width, *arguments):
        compiled = decode.lower(program, width, *arguments).compile()
        found.append(Decoding(arguments[2].cache, compiled.as_text()))
        return compiled(*arguments)

    monkeypatch.setattr(engine, 'decode', recorded)
    return found


def even_experts(model):
    """The same function with one unit of zeros more in every expert of an odd width, so that `tensor` divides it."""
    experts = model.config.experts
    if experts.width % 2 == 0:
        return model
    assert experts.shared_width % 2 == 1

    def widened(path, leaf):
        keys = path_keys(path)
        if not {'experts', 'shared'} & set(keys):
            return leaf
        inner = leaf.ndim - (1 if 'down' in keys else 2)
        return jnp.pad(leaf, [(0, axis == inner) for axis in range(leaf.ndim)])

    wider = dataclasses.replace(experts, width=experts.width + 1, shared_width=experts.shared_width + 1)
    config = dataclasses.replace(model.config, experts=wider)
    return dataclasses.replace(model, config=config, params=jax.tree_util.tree_map_with_path(widened, model.params))


def on_mesh(model, mesh):
    """The model divided over a mesh, its vocabulary padded."""
    params = to_device_layout(make_layout(model.params, mesh.shape), model.params)
    specs = param_specs(params, Rules(mesh.shape, units_of(model.config)))
    return dataclasses.replace(model, mesh=mesh, params=jax.device_put(params, shardings(mesh, specs)))


def entries(cache, kind):
    return [entry for kinds in cache.layers for entry in kinds if isinstance(entry, kind)]


def local_shape(array):
    return array.sharding.shard_shape(array.shape)


@pytest.mark.parametrize('name', ['nemotron_h_latent', 'deepseek_v3'])
def test_greedy_text_on_a_mesh_is_that_of_transformers(name, decoded):
    """Rows over data and expert, experts over expert, heads over tensor: of attention and of states."""
    golden = np.load(MODELS / name / 'golden.npz')
    model = even_experts(jpt.load(MODELS / name))
    prompts = [golden['prompt_0'].tolist(), golden['prompt_1'].tolist()]
    with jax.default_matmul_precision('highest'):
        results = on_mesh(model, make_mesh(MeshConfig(data=2, expert=2, tensor=2))).generate(
            prompts, max_new_tokens=12, temperature=0.0
        )
    assert [result.token_ids for result in results] == [golden['greedy_0'].tolist(), golden['greedy_1'].tolist()]

    (program,) = decoded
    recurrent, latents = entries(program.cache, Recurrent), entries(program.cache, Latents)
    assert bool(recurrent) == (name == 'nemotron_h_latent')
    assert bool(latents) == (name == 'deepseek_v3')
    for entry in recurrent:  # 4 rows, of which a device has one; 6 heads of width 8 in 2 groups, of which it has half
        assert local_shape(entry.state_BNPZ) == (1, 3, 8, 10)
        assert [local_shape(tail) for tail in entry[:3]] == [(1, 3, 24), (1, 3, 10), (1, 3, 10)]
    for entry in entries(program.cache, KeysValues):
        assert local_shape(entry.keys) == (1, 1, 10, 32)
    for entry in latents:
        assert local_shape(entry.latents)[-3:] == (1, *entry.latents.shape[-2:])

    # No array goes between devices that is as large as what one of them holds of a layer's states or latents.
    held = [entry.state_BNPZ for entry in recurrent] + [entry.latents for entry in latents]
    least = min(math.prod(local_shape(leaf)) for leaf in held)
    found = collectives(program.text)
    assert found, 'the sums over heads and experts at least'
    sent = [(item.kind, shape) for item in found for shape in item.shapes if math.prod(shape) >= least]
    assert sent == []


HYBRID = (Segment((LayerKind(mixer='mamba'), LayerKind(mlp_width=8, mixer='none'), LayerKind()), 2),)


@pytest.mark.parametrize(('groups', 'kv_heads'), [(2, 2), (1, 1), (2, 1), (1, 2)])
def test_what_tensor_does_not_divide_is_whole_on_every_device(groups, kv_heads):
    """Four heads of states are divided in any case; their groups, and the heads of keys, where there are enough."""
    space = StateSpace(4, 6, groups, 5, 3)
    cfg = ModelConfig('nemotron_h', 8, 16, 4, kv_heads, 4, HYBRID, 64, state_space=space)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=2, tensor=2))):
        ((recurrent, nothing, attention),) = place_cache(cfg, init_cache(cfg, 4, 8, 'float32')).layers
    assert nothing == ()
    assert local_shape(recurrent.state_BNPZ) == (2, 1, 2, 6, 5)
    own = groups // 2 * 5 if groups > 1 else 5
    assert [local_shape(tail) for tail in recurrent[:3]] == [(2, 1, 2, 12), (2, 1, 2, own), (2, 1, 2, own)]
    assert local_shape(recurrent.segment_B) == (2, 1)
    assert local_shape(attention.keys) == (2, 1, 1, 4, 8)
    assert local_shape(attention.values) == (2, 1, 1, 8, 4)
