"""A quantized model's layers compiled for eight H100 without one: kernels on shards, and each input rounded once."""

import importlib.util
import os
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jpt.models.config import Compute, LayerKind, ModelConfig, Rope, Segment
from jpt.models.transformer import init, locate, run_layers
from jpt.quant.recipes import chosen, quantized_tree, recipe_of
from jpt.sharding.mesh import MeshConfig, make_mesh
from jpt.sharding.rules import Rules, param_specs, shardings, units_of
from jpt.sharding.topology import PLUGINS, topology_devices

if not any(importlib.util.find_spec(name) for name in PLUGINS) and 'JPT_AOT' not in os.environ:
    pytest.skip("compiling for GPUs needs the extra 'aot'", allow_module_level=True)

LAYER = LayerKind(Rope(), None, 1024)
MODEL = ModelConfig('llama', 512, 512, 8, 4, 128, (Segment((LAYER,), 2),), 256)
B, T = 8, 256
KERNEL = re.compile(r'= (.*) custom-call\(.*custom_call_target="mosaic_gpu')


def program(mesh, gradient):
    """The layers on bfloat16, forward or with the gradient of what enters them, as XLA compiles it."""
    shapes = jax.eval_shape(partial(init, MODEL, dtype='bfloat16'), jax.random.key(0))
    formats = chosen(shapes, recipe_of([('layers/**', 'fp8_block')]))
    params = jax.eval_shape(lambda tree: quantized_tree(tree, formats), shapes)
    devices = make_mesh(mesh, topology_devices(mesh.tensor * mesh.fsdp * mesh.data))
    places = shardings(devices, param_specs(params, Rules(devices.shape, units_of(MODEL))))
    params = jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), params, places)
    rows = jax.sharding.NamedSharding(devices, P(('data', 'fsdp')))
    hidden = jax.ShapeDtypeStruct((B, T, MODEL.width), jnp.bfloat16, sharding=rows)

    def forward(hidden, layers):
        positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
        where = locate(MODEL, positions, jnp.ones((B, T), jnp.int32), 'bfloat16')
        return run_layers(MODEL, layers, hidden, where, Compute('bfloat16', attention='blockwise')).hidden_BTD

    step = jax.grad(lambda *given: jnp.sum(forward(*given).astype(jnp.float32))) if gradient else forward
    with jax.set_mesh(devices):
        return jax.jit(step).trace(hidden, params['layers']).lower().compile()


@pytest.mark.parametrize('gradient', [False, True], ids=('forward', 'gradient'))
@pytest.mark.parametrize(
    'mesh', [MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2)], ids=('one device', 'eight devices')
)
def test_a_layer_rounds_four_inputs_and_has_seven_products(mesh, gradient):
    """What enters q, k and v is one array of codes; on a mesh every kernel has the rows and columns of its shard."""
    text = program(mesh, gradient).as_text()
    rows, half = B * T // (mesh.data * mesh.fsdp), mesh.tensor
    dtype = {1: 'bf16', 2: 'f32'}[half]  # parts of sums over shards are in float32
    wanted = [f'f8e4m3fn[{rows},{width}]' for width in (512, 1024 // half, 512, 1024 // half)]  # normed, attention, ...
    wanted += [f'bf16[{rows},{width // half}]' for width in (1024, 512, 512, 1024, 1024)]  # q, k, v, gate, up
    wanted += 2 * [f'{dtype}[{rows},512]']  # out, down
    found = [kernel.lstrip('(').split('{')[0] for kernel in KERNEL.findall(text)]
    assert sorted(found) == sorted(wanted)
    # Weights are gathered, activations are not: they have a shard's rows as they come in.
    gathered = re.findall(r'= (.*) all-gather(?:-start)?\(', text)
    shapes = {shape for types in gathered for shape in re.findall(r'\[([\d,]+)\]', types)}
    assert bool(shapes) == (mesh.fsdp > 1)
    assert not [shape for shape in shapes if str(T) in shape.split(',')[1:-1] or str(B * T) in shape.split(',')]
