"""Small models, a batch with everything in it, and one training step on any mesh."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpt.data.batch import Batch
from jpt.models.config import Compute, Experts, LayerKind, ModelConfig, Rope, Segment, StateSpace, runs_of
from jpt.models.transformer import Forward, forward, init, unembed
from jpt.sharding.grads import loss_and_grads
from jpt.sharding.layout import to_canonical_layout, to_device_layout
from jpt.sharding.mesh import MeshConfig, batch_shardings, make_mesh
from jpt.sharding.plan import make_plan
from jpt.sharding.rules import shardings
from jpt.training.auxiliary import Auxiliary
from jpt.training.freeze import merge, partition
from jpt.training.objective import language_modeling
from jpt.training.settings import RouterConfig

HYBRID = {
    'M': LayerKind(mixer='mamba'),
    '*': LayerKind(),
    '-': LayerKind(mlp_width=24, mixer='none'),
    'E': LayerKind(experts=True, mixer='none'),
}
LOCAL, WHOLE = LayerKind(Rope(), 4, 24), LayerKind(Rope(1e6), None, 24)
MODELS = {
    # Seven equal layers; three KV heads and a vocabulary that no mesh divides.
    'even': ModelConfig('llama', 50257, 16, 6, 3, 4, (Segment((LayerKind(Rope(), None, 24),), 7),), 64),
    # Seven layers of period three, tied tables, norms after, soft caps.
    'mixed': ModelConfig(
        'gemma3_text',
        53,
        16,
        4,
        2,
        4,
        runs_of(((LOCAL, LOCAL, WHOLE) * 3)[:7]),
        64,
        qk_norm=True,
        post_norms=True,
        norm_offset=1.0,
        attention_soft_cap=4.0,
        logit_soft_cap=3.0,
        tied=True,
    ),
    # Mamba, attention, MLP and expert layers, without a period.
    'hybrid': ModelConfig(
        'nemotron_h',
        53,
        16,
        4,
        2,
        4,
        runs_of(tuple(HYBRID[letter] for letter in 'MM*-MEM')),
        64,
        activation='relu2',
        gated_mlp=False,
        state_space=StateSpace(4, 6, 2, 5, 3, bias=True),
        experts=Experts(4, 2, 12, 'sigmoid', shared_width=12, latent_width=8),
    ),
    # Norms after attention and MLP only; queries and keys normed over heads that a mesh divides.
    'over_heads': ModelConfig(
        'olmo2',
        53,
        16,
        4,
        2,
        4,
        (Segment((WHOLE,), 4),),
        64,
        pre_norms=False,
        post_norms=True,
        qk_norm=True,
        qk_norm_over_heads=True,
    ),
    # A dense layer, then four with experts, in groups.
    'experts': ModelConfig(
        'qwen3_moe',
        53,
        16,
        4,
        2,
        4,
        (Segment((WHOLE,), 1), Segment((dataclasses.replace(WHOLE, experts=True),), 4)),
        64,
        experts=Experts(8, 2, 12, 'sigmoid', scale=1.5, groups=4, top_groups=2, shared_width=20),
    ),
}
MODELS['batch_balanced'] = MODELS['experts']
ROUTERS = {
    'hybrid': RouterConfig(balance_loss=0.5),
    'experts': RouterConfig(balance_loss=0.5, z_loss=0.05),
    'batch_balanced': RouterConfig(balance_loss=0.5, balance_over='batch'),
}


@functools.cache
def canonical_params(model: str) -> Any:
    """Random parameters as float64 numpy arrays, all about as large as an initializer would make the kernels."""
    shapes = jax.eval_shape(functools.partial(init, MODELS[model]), jax.random.key(0))
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: 0.3 * random.normal(size=leaf.shape), shapes)


def make_batch(vocab: int, dtype: Any = np.float64) -> Batch:
    """[8, 8]: two documents and a token of padding per row; rows 2 and 3 without any loss, weights of all sizes."""
    random = np.random.default_rng(2)
    segments = np.tile([1, 1, 1, 2, 2, 2, 2, 0], (8, 1)).astype(np.int32)
    positions = np.tile([0, 1, 2, 0, 1, 2, 3, 0], (8, 1)).astype(np.int32)
    mask = (random.random((8, 8)) * (random.random((8, 8)) < 0.8) * (segments > 0)).astype(dtype)
    mask[2:4] = 0
    tokens, targets = random.integers(0, vocab, (2, 8, 8), dtype=np.int32)
    return Batch(tokens, targets, mask, positions, segments)


def whole_loss(cfg: ModelConfig, params: Any, batch: Batch, dtype: str = 'float64') -> tuple[jax.Array, Forward]:
    """Cross-entropy from whole logits, without jpt.sharding, and the pass that it comes from."""
    inputs = batch.tokens, batch.positions, batch.segment_ids
    result = forward(cfg, params, *inputs, compute=Compute(dtype, attention='dense'))
    logp = jax.nn.log_softmax(unembed(cfg, params, result.hidden_BTD))
    chosen = jnp.take_along_axis(logp, jnp.asarray(batch.targets)[..., None], -1)[..., 0]
    return -jnp.sum(chosen * batch.loss_mask) / jnp.sum(batch.loss_mask), result


def whole_step(cfg: ModelConfig, params: Any, frozen: Any, dtype: str = 'float64') -> tuple[float, Any]:
    """Cross-entropy and its gradients for `params` on one device, without jpt.sharding."""
    batch = make_batch(cfg.vocab_size, dtype)

    def loss(params):
        return whole_loss(cfg, merge(params, frozen), batch, dtype)[0]

    total, grads = jax.jit(jax.value_and_grad(loss))(params)
    return float(total), jax.tree.map(np.asarray, grads)


@functools.cache
def reference(model: str) -> tuple[float, Any, float]:
    """Loss, gradients and cross-entropy in float64 from whole logits on one device, without jpt.sharding."""
    cfg, batch = MODELS[model], make_batch(MODELS[model].vocab_size)

    def loss(params):
        ce, result = whole_loss(cfg, params, batch)
        if cfg.experts is None:
            return ce, ce
        router, balance = ROUTERS[model], result.router.balance
        if router.balance_over == 'batch':
            used_LE = jax.lax.stop_gradient(result.router.load[1:])  # the first layer is dense
            even_L1 = jnp.sum(used_LE, axis=1, keepdims=True) / cfg.experts.count
            balance = jnp.sum(used_LE / even_L1 * result.router.share[1:])
        auxiliary = router.balance_loss * balance + router.z_loss * result.router.z
        return ce + auxiliary / np.sum(batch.segment_ids > 0), ce

    (total, ce), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(canonical_params(model))
    return float(total), jax.tree.map(np.asarray, grads), float(ce)


class Step(NamedTuple):
    """A compiled step with what it was compiled for, and its results in the canonical layout."""

    run: Any  # (params, frozen, batch) -> (total, grads, sums), all in the device layout
    plan: Any
    params: Any
    frozen: Any
    batch: Batch
    total: float
    grads: Any
    sums: Any


def step_on(
    model: str,
    mesh: MeshConfig,
    microbatches: int = 1,
    *,
    schedule: str = '1f1b',
    chunks: int = 1,
    remat: str = 'none',
    dtype: str = 'float64',
    frozen: tuple[str, ...] = (),
) -> Step:
    """One training step on eight devices."""
    cfg = MODELS[model]
    objective = language_modeling(cfg, Compute(dtype, remat), Auxiliary(ROUTERS.get(model, RouterConfig())))
    params, rest = partition(jax.tree.map(lambda leaf: leaf.astype(dtype), canonical_params(model)), frozen)
    pipeline = {'num_microbatches': microbatches, 'chunks': chunks, 'schedule': schedule}
    return run_step(cfg, objective, params, rest, mesh, dtype, **pipeline)


def run_step(
    cfg: ModelConfig, objective: Any, params: Any, frozen: Any, mesh: MeshConfig, dtype: str, **pipeline: Any
) -> Step:
    """One step of canonical parameters on eight devices; `pipeline`: other arguments of make_plan."""
    devices = make_mesh(mesh)
    plan = make_plan(devices, {'model': cfg}, params, {'model': frozen}, dtype=dtype, **pipeline)
    place = functools.partial(to_device_layout, plan.layouts['model'])
    params = jax.device_put(place(params), shardings(devices, plan.specs))
    kept = {'model': jax.device_put(place(frozen), shardings(devices, plan.frozen_specs['model']))}
    batch = make_batch(cfg.vocab_size, dtype)
    batch = jax.device_put(batch, batch_shardings(devices, batch))
    run = jax.jit(lambda params, kept, batch: loss_and_grads(objective, params, kept, batch, plan))
    total, grads, sums = run(params, kept, batch)
    home = to_canonical_layout(plan.layouts['model'], jax.tree.map(np.asarray, grads))
    return Step(run, plan, params, kept, batch, float(total), home, sums)


def worst_error(got: Any, wanted: Any) -> float:
    """The largest relative error of a tensor, by its norm; leaves that `got` does not have are left out."""

    def error(one, other):
        if one is None:
            return 0.0
        return float(np.linalg.norm(np.asarray(one, np.float64) - other) / np.linalg.norm(other))

    return max(jax.tree.leaves(jax.tree.map(error, got, wanted, is_leaf=lambda leaf: leaf is None)))
