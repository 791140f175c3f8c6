"""A distillation step on any mesh, and the same loss written plainly from whole logits and taps of one device."""

import dataclasses
import functools
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / 'sharding'))
from sharded_steps import MODELS, make_batch

from jpt.data.batch import Batch
from jpt.distill.objective import logit_distillation
from jpt.distill.pairs import HiddenPair, new_projections
from jpt.distill.settings import DistillConfig
from jpt.models.config import Compute, LayerKind, ModelConfig, Rope, Segment
from jpt.models.transformer import forward, init, unembed
from jpt.sharding.grads import loss_and_grads
from jpt.sharding.layout import to_canonical_layout, to_device_layout
from jpt.sharding.mesh import MeshConfig, batch_shardings, make_mesh
from jpt.sharding.plan import make_plan
from jpt.sharding.rules import shardings
from jpt.training.auxiliary import Auxiliary

# Six layers with norms after, soft caps and tied tables; five of another width; of one kind each, to compile quickly.
WIDE = dataclasses.replace(MODELS['mixed'], segments=(Segment((LayerKind(Rope(), 4, 24),), 6),))
NARROW = ModelConfig('llama', 53, 12, 2, 1, 6, (Segment((LayerKind(Rope(), None, 20),), 5),), 64)


def projected(*arguments: Any, **named: Any) -> HiddenPair:
    return HiddenPair(*arguments, **named, projection=True)


class Case(NamedTuple):
    """Two models and their pairs."""

    student: ModelConfig
    teacher: ModelConfig
    distill: DistillConfig


CASES = {
    # Widths of 16 and 12: pairs at both ends and in the middle, early to late and late to early.
    'widths': Case(
        WIDE,
        NARROW,
        DistillConfig(
            alpha=0.6,
            temperature=2.0,
            pairs=(
                projected('embed.output', 'layers.4.output', weight=0.7),
                projected('layers.5.output', 'embed.output', 'mse', 0.3),
                projected('layers.2.attention', 'layers.1.attention', 'smooth_l1', 0.5, 0.2),
                projected('layers.3.input', 'layers.3.input', 'mse', 1.5),
                projected('final_norm.output', 'final_norm.output', weight=0.2),
            ),
        ),
    ),
    # Five layers with experts and six without, of one width.
    'experts': Case(
        MODELS['experts'],
        WIDE,
        DistillConfig(
            alpha=0.0,
            pairs=(
                HiddenPair('layers.0.output', 'layers.5.attention', weight=2.0),
                HiddenPair('layers.4.attention', 'layers.0.output', 'mse', 0.4),
                HiddenPair('layers.2.output', 'layers.2.output', 'smooth_l1', 0.5, 0.3),
                HiddenPair('layers.2.output', 'layers.5.input'),
            ),
        ),
    ),
}


@functools.cache
def parameters(case: str) -> tuple[Any, Any]:
    """Student (with projections) and teacher, float64, kernels and norms alike at random."""
    student, teacher, distill = CASES[case]
    random = np.random.default_rng(5)

    def draw(shapes: Any) -> Any:
        return jax.tree.map(lambda leaf: 0.3 * random.normal(size=leaf.shape), shapes)

    frozen = draw(jax.eval_shape(functools.partial(init, teacher), jax.random.key(0)))
    maps = new_projections(distill.pairs, student, {'teacher': teacher}, jax.random.key(0), 'float32')
    params = draw(jax.eval_shape(functools.partial(init, student), jax.random.key(0)))
    return params | ({'projections': draw(maps)} if maps else {}), frozen


def distance(pair: HiddenPair, s: jax.Array, t: jax.Array) -> jax.Array:
    """Of every token, by the definition."""
    match pair.loss:
        case 'cosine':
            return 1 - jnp.sum(s * t, -1) / jnp.linalg.norm(s, axis=-1) / jnp.linalg.norm(t, axis=-1)
        case 'mse':
            return jnp.sum((s - t) ** 2, -1) / t.shape[-1]
        case 'smooth_l1':
            d = jnp.abs(s - t)
            return jnp.sum(jnp.where(d < pair.beta, d * d / 2 / pair.beta, d - pair.beta / 2), -1) / t.shape[-1]


@functools.cache
def reference(case: str) -> tuple[float, Any, dict[str, float]]:
    """Loss, gradients and the mean of every pair in float64, without jpt.sharding and jpt.distill's losses."""
    student, teacher, distill = CASES[case]
    batch = make_batch(53)
    params, frozen = parameters(case)
    weights = batch.loss_mask / np.sum(batch.loss_mask)
    used = batch.loss_mask[..., None] > 0

    def run(cfg: ModelConfig, params: Any, names: list[str]) -> tuple[jax.Array, dict[str, jax.Array]]:
        compute = Compute('float64', attention='dense')
        result = forward(cfg, params, batch.tokens, batch.positions, batch.segment_ids, taps=names, compute=compute)
        return unembed(cfg, params, result.hidden_BTD), result.taps

    def loss(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        ours, states = run(student, params, [pair.student for pair in distill.pairs])
        theirs, goals = run(teacher, frozen, [pair.teacher for pair in distill.pairs])
        p, q = (jax.nn.log_softmax(logits / distill.temperature) for logits in (theirs, ours))
        kl = distill.temperature**2 * jnp.sum(jnp.exp(p) * (p - q), axis=-1)
        logp = jax.nn.log_softmax(ours)
        ce = -jnp.take_along_axis(logp, jnp.asarray(batch.targets)[..., None], -1)[..., 0]
        total = jnp.sum(weights * (distill.alpha * kl + (1 - distill.alpha) * ce))
        means = {}
        for pair in distill.pairs:
            state = states[pair.student]
            if pair.projection:
                state = state @ params['projections'][pair.key]['to_teacher']['kernel'].T
            # Padding attends to nothing: its attention is 0 and has no direction.
            both = (jnp.where(used, x, 1) for x in (state, goals[pair.teacher]))
            means[pair.name] = jnp.sum(weights * distance(pair, *both))
            total += pair.weight * means[pair.name]
        return total, means

    (total, means), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return float(total), jax.tree.map(np.asarray, grads), {name: float(mean) for name, mean in means.items()}


class Step(NamedTuple):
    """A compiled step, its arguments, and its results in the canonical layout."""

    run: Any  # (params, frozen, batch) -> (total, grads, sums)
    arguments: tuple[Any, Any, Batch]
    total: float
    grads: Any
    sums: Any


def step_on(
    student: ModelConfig,
    teacher: ModelConfig,
    distill: DistillConfig,
    params: Any,
    frozen: Any,
    sizes: dict[str, int],
    microbatches: int = 1,
    **options: Any,
) -> Step:
    """One training step with one teacher in float64 on as many devices as the mesh has."""
    models, weights = {'student': student, 'teacher': teacher}, {'student': params, 'teacher': frozen}
    return step_of(models, distill, weights, make_batch(student.vocab_size), sizes, microbatches, **options)


def step_of(
    models: dict[str, ModelConfig],
    distill: DistillConfig,
    weights: dict[str, Any],
    batch: Batch,
    sizes: dict[str, int],
    microbatches: int = 1,
    **options: Any,
) -> Step:
    """The same with any number of teachers, which are all models but the student, on any batch."""
    student, params = models['student'], weights['student']
    configs, trees = ({n: x for n, x in every.items() if n != 'student'} for every in (models, weights))
    mesh = make_mesh(MeshConfig(**{'data': 1} | sizes), jax.devices()[: int(np.prod(list(sizes.values())))])
    frozen = {'model': jax.tree.map(lambda _: None, params)} | trees
    all_configs = {'model': student} | configs
    plan = make_plan(mesh, all_configs, params, frozen, num_microbatches=microbatches, dtype='float64', **options)
    shares = (1 / len(configs),) * len(configs)
    objective = logit_distillation(student, configs, Compute('float64'), distill, Auxiliary(), shares)
    places = shardings(mesh, (plan.specs, plan.frozen_specs))
    placed = jax.device_put(to_device_layout(plan.layouts['model'], params), places[0])
    frozen |= {name: to_device_layout(plan.layouts[name], tree) for name, tree in trees.items()}
    arguments = placed, jax.device_put(frozen, places[1]), jax.device_put(batch, batch_shardings(mesh, batch))
    run = jax.jit(lambda *given: loss_and_grads(objective, *given, plan))
    total, grads, sums = run(*arguments)
    home = to_canonical_layout(plan.layouts['model'], jax.tree.map(np.asarray, grads))
    return Step(run, arguments, float(total), home, sums)
