"""From settings to everything that a run needs: models, mesh, plan, objective, optimizer, step, first state."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jpt.checkpoint.opening import open_model
from jpt.checkpoint.source import LeafSource, load_tree
from jpt.data.batch import Batch, empty_batch
from jpt.distill.objective import logit_distillation
from jpt.models.config import Compute, ModelConfig
from jpt.models.families import config_from_hf
from jpt.models.transformer import init
from jpt.quant.lora import FREEZE_ALL_BUT_LORA, add_lora, merge_lora
from jpt.sharding.layout import to_canonical_layout, to_device_layout
from jpt.sharding.mesh import batch_shardings, check_batch, make_mesh
from jpt.sharding.plan import Plan, make_plan
from jpt.sharding.rules import shardings, state_specs
from jpt.training.ema import init_ema
from jpt.training.freeze import merge, partition
from jpt.training.objective import Objective, language_modeling
from jpt.training.optimizer import Optimizer, make_optimizer
from jpt.training.schedule import make_schedule
from jpt.training.settings import ModelSource, TrainConfig
from jpt.training.state import TrainState
from jpt.training.step import make_eval_step, make_step


class Weights(NamedTuple):
    """A model and where its weights come from: a checkpoint, or a random draw where source is None."""

    cfg: ModelConfig
    source: LeafSource | None


class Job(NamedTuple):
    """A training job, ready to run; `state` and `batch` are its shapes."""

    config: TrainConfig
    models: dict[str, Weights]  # 'model', and 'teacher' where there is one
    mesh: Mesh
    plan: Plan
    objective: Objective
    optimizer: Optimizer
    state: Any  # TrainState of shapes in the device layout, with shardings
    batch: Batch  # shapes
    batch_shardings: Batch
    step: Any  # jitted (state, batch) -> (state, metrics), the state donated
    eval_step: Any  # jitted (state, batch) -> metrics


def open_weights(given: ModelSource, dtype: str | None) -> Weights:
    """The model that a source names."""
    if given.path is not None:
        source = open_model(given.path, dtype).source
        return Weights(source.cfg, source)
    return Weights(config_from_hf(given.architecture or {}), None)


def make_job(config: TrainConfig, devices: Any = None) -> Job:
    """Builds a job and checks that its parts fit, without touching weights or data.

    Raises:
        ValueError: a setting that does not hold, by its name.
    """
    mesh = make_mesh(config.mesh, devices)
    check_batch(mesh, config.batch.size, config.batch.length, config.batch.microbatches)
    models = {'model': open_weights(config.model, config.compute.param_dtype)}
    if config.teacher is not None:
        models['teacher'] = open_weights(config.teacher, config.compute.dtype)
        if models['teacher'].source is None:
            raise ValueError(
                'config.teacher.architecture: a teacher needs trained weights: expected config.teacher.path'
            )
    compute = Compute(
        dtype=config.compute.dtype,
        remat=config.compute.remat,
        attention=config.compute.attention,
        unroll=config.compute.unroll,
    )
    objective = _objective(config, models, compute)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.schedule, config.steps))
    plan = _plan(config, models, mesh)
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, empty_batch(config.batch.size, config.batch.length)))
    step = make_step(objective, optimizer, plan, config.ema)
    placed = batch_shardings(mesh, batch)
    job = Job(config, models, mesh, plan, objective, optimizer, None, batch, placed, None, None)
    state = _abstract_state(job)
    where = places_of(state)
    return job._replace(
        state=state,
        step=jax.jit(step, in_shardings=(where, placed), out_shardings=(where, None), donate_argnums=0),
        eval_step=jax.jit(make_eval_step(objective, plan), in_shardings=(where, placed)),
    )


def _objective(config: TrainConfig, models: dict[str, Weights], compute: Compute) -> Objective:
    cfg = models['model'].cfg
    if config.task == 'distill':
        return logit_distillation(
            cfg,
            models['teacher'].cfg,
            compute,
            temperature=config.distill.temperature,
            alpha=config.distill.alpha,
        )
    return language_modeling(cfg, compute)


def _drawn(config: TrainConfig, name: str, weights: Weights, key: jax.Array) -> Any:
    """Random weights in the canonical layout."""
    return init(weights.cfg, key, config.compute.param_dtype if name == 'model' else config.compute.dtype)


def _adapted(config: TrainConfig, models: dict[str, Any], key: jax.Array) -> dict[str, Any]:
    """The models with adapters where the job trains adapters."""
    lora = config.lora
    if lora is None:
        return models
    model = add_lora(models['model'], key, lora.targets, rank=lora.rank, alpha=lora.alpha, place='config.lora.targets')
    return models | {'model': model}


def _trees(config: TrainConfig, models: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The trainable tree and the frozen ones, from whole models."""
    freeze = config.freeze if config.lora is None else FREEZE_ALL_BUT_LORA
    params, frozen = partition(models['model'], freeze, 'config.freeze')
    return params, {'model': frozen} | {name: tree for name, tree in models.items() if name != 'model'}


def _abstract_models(config: TrainConfig, models: dict[str, Weights]) -> dict[str, Any]:
    """Shapes of the models in the canonical layout, as their weights are stored or drawn."""

    def make(key: jax.Array) -> dict[str, Any]:
        return {name: _drawn(config, name, weights, key) for name, weights in models.items()}

    return jax.eval_shape(make, _abstract_key())


def _abstract_key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _plan(config: TrainConfig, models: dict[str, Weights], mesh: Mesh) -> Plan:
    abstract = _abstract_models(config, models)
    adapted = jax.eval_shape(functools.partial(_adapted, config), abstract, _abstract_key())
    params, frozen = _trees(config, adapted)
    return make_plan(
        mesh,
        {name: weights.cfg for name, weights in models.items()},
        params,
        frozen,
        num_microbatches=config.batch.microbatches,
        chunks=config.compute.chunks,
        schedule=config.compute.pipeline,
        dtype=config.compute.dtype,
    )


def _fresh_state(job: Job, models: dict[str, Any], key: jax.Array) -> TrainState:
    """The state before the first step, in the device layout, from whole models in the canonical one."""
    adapted = _adapted(job.config, models, jax.random.fold_in(key, 0))
    placed = {name: to_device_layout(job.plan.layouts[name], tree) for name, tree in adapted.items()}
    params, frozen = _trees(job.config, placed)
    ema = None if job.config.ema is None else init_ema(params)
    return TrainState(jnp.zeros((), jnp.int32), params, frozen, job.optimizer.init(params), ema, key)


def _abstract_state(job: Job) -> TrainState:
    """Shapes of the state with the sharding of each leaf."""
    models = _abstract_models(job.config, job.models)
    state = jax.eval_shape(functools.partial(_fresh_state, job), models, _abstract_key())
    specs = state_specs(state, state.params, job.plan.specs, job.mesh.shape)._replace(frozen=job.plan.frozen_specs)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        shardings(job.mesh, specs),
    )


def places_of(state: TrainState) -> TrainState:
    """The sharding of every leaf of a state or of its shapes."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def first_state(job: Job) -> TrainState:
    """The state before the first step, on its devices: weights read or drawn, moments zero."""
    loaded = {name: load_tree(w.source) for name, w in job.models.items() if w.source is not None}
    drawn = {name: w for name, w in job.models.items() if w.source is None}

    def make(loaded: dict[str, Any], key: jax.Array) -> TrainState:
        draw, rest = jax.random.split(key)
        models = {name: _drawn(job.config, name, weights, draw) for name, weights in drawn.items()}
        return _fresh_state(job, models | loaded, rest)

    return jax.jit(make, out_shardings=places_of(job.state))(loaded, jax.random.key(job.config.seed))


def canonical(job: Job, state: TrainState) -> TrainState:
    """The state as checkpoints hold it: canonical layout, and no teacher, whose own checkpoint has it."""
    kept = state._replace(frozen={'model': state.frozen['model']})
    layout = job.plan.layouts['model']
    if not (layout.staged or layout.padded_vocab > layout.vocab):
        return kept
    return jax.jit(functools.partial(to_canonical_layout, layout))(kept)


def canonical_shapes(job: Job) -> TrainState:
    """What a checkpoint of this job holds; with shardings where the layouts are the same."""
    kept = job.state._replace(frozen={'model': job.state.frozen['model']})
    layout = job.plan.layouts['model']
    if not (layout.staged or layout.padded_vocab > layout.vocab):
        return kept
    return jax.eval_shape(functools.partial(to_canonical_layout, layout), kept)


def from_canonical(job: Job, kept: TrainState) -> TrainState:
    """The state on its devices, from what a checkpoint held; a teacher is read from its own source."""
    layout = job.plan.layouts['model']
    teachers = {name: w for name, w in job.models.items() if name != 'model'}
    loaded = {name: load_tree(w.source) for name, w in teachers.items() if w.source is not None}

    def make(kept: TrainState, loaded: dict[str, Any]) -> TrainState:
        state = to_device_layout(layout, kept)
        others = {name: to_device_layout(job.plan.layouts[name], tree) for name, tree in loaded.items()}
        return state._replace(frozen=state.frozen | others)

    return jax.jit(make, out_shardings=places_of(job.state))(kept, loaded)


def adapted_model(job: Job, state: TrainState, *, averaged: bool = False) -> Any:
    """The trained model's parameters in the canonical layout; the moving average if asked, where there is one."""
    params = state.ema if averaged and state.ema is not None else state.params
    kept = canonical(job, state._replace(params=params))
    return merge(kept.params, kept.frozen['model'])


def whole_model(job: Job, state: TrainState, *, averaged: bool = False) -> Any:
    """The same with adapters merged into their kernels."""
    return merge_lora(adapted_model(job, state, averaged=averaged))
