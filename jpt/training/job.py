"""From settings to everything that a run needs: models, mesh, plan, objective, optimizer, step, first state."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jpt.checkpoint.adapted import is_adapter
from jpt.checkpoint.fingerprint import fingerprint_of
from jpt.checkpoint.opening import model_directory, open_model
from jpt.checkpoint.selected import SelectedLayers
from jpt.checkpoint.source import LeafSource, load_tree
from jpt.data.alignment import SecondReader
from jpt.data.batch import Batch, empty_batch
from jpt.data.recorded import RecordedTargets
from jpt.distill.aligned import words_of
from jpt.distill.mixture import changing, token_loss
from jpt.distill.objective import logit_distillation
from jpt.distill.pairs import new_projections
from jpt.distill.settings import RecordConfig, TeacherMesh
from jpt.kernels.distillation_loss import Teacher
from jpt.kernels.sparse_target import no_words
from jpt.models.config import Compute, ModelConfig
from jpt.models.families import config_from_hf
from jpt.models.names import BESIDE, get, put
from jpt.models.transformer import init
from jpt.quant.lora import FREEZE_ALL_BUT_LORA, add_lora, merge_lora
from jpt.quant.recipes import RESULTS
from jpt.sharding.layout import laid_out, to_canonical_layout, to_device_layout
from jpt.sharding.mesh import batch_shardings, check_batch, make_mesh
from jpt.sharding.plan import Plan, make_plan
from jpt.sharding.rules import Rules, param_specs, shardings, state_specs, storage_specs, units_of
from jpt.training.auxiliary import Auxiliary
from jpt.training.ema import averaged as averaged_parameters
from jpt.training.ema import init_ema
from jpt.training.freeze import merge, partition
from jpt.training.objective import Objective, language_modeling
from jpt.training.optimizer import Optimizer, make_optimizer
from jpt.training.rounding import Rounding, calibrated_rounding, check_export, rounded_model
from jpt.training.router import make_correction
from jpt.training.schedule import make_schedule
from jpt.training.settings import ModelSource, TrainConfig, teacher_alone
from jpt.training.state import TrainState
from jpt.training.step import make_eval_step, make_step
from jpt.training.tokenizers import open_second


class Weights(NamedTuple):
    """A model and where its weights come from: a checkpoint, or a random draw where source is None."""

    cfg: ModelConfig
    source: LeafSource | None
    origin: Path | None = None  # the directory with the card of these weights
    calibrated: Rounding | None = None  # of config.quantize.calibrated


class Job(NamedTuple):
    """A training job, ready to run; `state` and `batch` are its shapes."""

    config: TrainConfig
    models: dict[str, Weights]  # 'model', and teachers by their names
    mesh: Mesh
    plan: Plan
    objective: Objective
    optimizer: Optimizer
    state: Any  # TrainState of shapes in the device layout, with shardings
    batch: Batch  # shapes
    batch_shardings: Batch
    step: Any  # jitted (state, batch) -> (state, metrics), the state donated
    eval_step: Any  # jitted (state, batch) -> metrics
    targets: RecordedTargets | None = None  # what a teacher said, where it was recorded
    apart: Any = None  # the job of a teacher on a mesh of its own, where there is one
    teacher: Any = None  # the same as a program with its weights (distill.teacher), once these are read
    second: SecondReader | None = None  # reads the texts for a teacher whose tokenizer is another


def open_weights(given: ModelSource, dtype: str | None, *, codes: bool = False) -> Weights:
    """The model that a source names; with `codes` its quantized weights stay so."""
    if given.path is not None:
        opened = open_model(given.path, dtype, mtp=given.mtp, codes=codes)
        source = SelectedLayers(opened.source, given.layers) if given.layers else opened.source
        return Weights(source.cfg, source, opened.origin)
    cfg = config_from_hf(given.architecture or {})
    return Weights(cfg if given.mtp else dataclasses.replace(cfg, mtp=()), None)


def make_job(config: TrainConfig, devices: Any = None) -> Job:
    """Builds a job and checks that its parts fit, without touching weights or data.

    Raises:
        ValueError: a setting that does not hold, by its name.
    """
    ours, theirs = divided(config.teacher_mesh, jax.devices() if devices is None else devices)
    mesh = make_mesh(config.mesh, ours)
    check_batch(mesh, config.batch.size, config.batch.length, config.batch.microbatches)
    path = config.model.path
    if config.lora is not None and path is not None and is_adapter(model_directory(path)):
        raise ValueError(
            f'config.model.path={path}: a PEFT adapter, and config.lora would train another on top of it, which no '
            f'program opens: expected a model; python -m jpt.convert --input={path} --to=hf merges the adapter into one'
        )
    # Codes cannot be trained, but adapters beside them can.
    models = {'model': open_weights(config.model, config.compute.param_dtype, codes=config.lora is not None)}
    if config.quantize is not None and config.quantize.calibrated is not None:
        rounding = calibrated_rounding(config.quantize.calibrated, models['model'].cfg, config.quantize.clipped)
        models['model'] = models['model']._replace(calibrated=rounding)
    for name, teacher in config.teachers_beside().items():
        models[name] = open_weights(dataclasses.replace(teacher, mtp=False), teacher_dtype(config), codes=True)
    compute = Compute(
        dtype=config.compute.dtype,
        remat=config.compute.remat,
        attention=config.compute.attention,
        unroll=config.compute.unroll,
        exchange=config.compute.exchange,
    )
    for name, weights in models.items():
        if not weights.cfg.causal:
            raise ValueError(f'config.{name}: {weights.cfg.family} is an encoder: expected a model that predicts text')
    if config.mtp_loss and not models['model'].cfg.mtp:
        raise ValueError(
            f'config.mtp_loss={config.mtp_loss}: config.model has no modules that predict further tokens '
            '(num_nextn_predict_layers): expected 0'
        )
    source = models['model'].source
    if config.checkpoint.export and source is not None and source.quantized:
        check_export('config.model.path', source.cfg, source.quantized)
    targets = _targets(config, models)
    second = _second(config, mesh)
    apart = _apart(config, theirs)
    objective = _objective(config, models, compute, targets, second, apart)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.schedule, config.steps))
    plan = _plan(config, models, mesh)
    batch = _abstract_batch(config, targets, second, apart)
    correct = make_correction(models['model'].cfg, plan.layouts['model'], config.router.correction_rate)
    step = make_step(objective, optimizer, plan, config.ema, correct if config.router.correction_rate else None)
    placed = batch_shardings(mesh, batch)
    beside: dict[str, Any] = {'targets': targets, 'second': second, 'apart': apart}
    job = Job(config, models, mesh, plan, objective, optimizer, None, batch, placed, None, None, **beside)
    state = _abstract_state(job)
    where = places_of(state)
    return job._replace(
        state=state,
        step=jax.jit(step, in_shardings=(where, placed), out_shardings=(where, None), donate_argnums=0),
        eval_step=jax.jit(make_eval_step(objective, plan), in_shardings=(where, placed)),
    )


def _apart(config: TrainConfig, devices: Any) -> Job | None:
    """The job of a teacher on a mesh of its own, where it has one; its errors say that they are of that mesh."""
    mesh = config.teacher_mesh
    if mesh is None:
        return None
    try:
        return make_job(teacher_alone(config, mesh, mesh.microbatches), devices)
    except ValueError as error:
        raise ValueError(f'config.teacher_mesh: {error}') from error


def divided(teacher: TeacherMesh | None, devices: Any) -> tuple[Any, Any]:
    """The devices of the student, and those of a teacher on a mesh of its own.

    Raises:
        ValueError: none is left for the student, or devices of the teacher's own are asked for in several processes.
    """
    if teacher is None or not teacher.devices:
        return devices, devices
    place = f'config.teacher_mesh.devices={teacher.devices}'
    if jax.process_count() > 1:
        raise ValueError(
            f'{place}: here are {jax.process_count()} processes, of which each takes part in both: expected 0'
        )
    if teacher.devices >= len(devices):
        raise ValueError(f'{place}: expected less than the {len(devices)} devices that are here')
    return devices[: -teacher.devices], devices[-teacher.devices :]


def teacher_dtype(config: TrainConfig) -> str:
    """Of the weights and the products of teachers."""
    return config.compute.teacher_dtype or config.compute.dtype


def vocabulary_of(record: RecordConfig, vocab_size: int, student: int | None = None) -> int:
    """How many words of a teacher with so many take part, beside a student with so many.

    Raises:
        ValueError: more words are asked for than it has.
    """
    asked, most = record.vocab_size or vocab_size, student or vocab_size
    for name, value, whose, allowed in (
        ('vocab_size', asked, 'teacher', vocab_size),
        ('likely', record.likely, 'teacher', vocab_size),
        ('likely', record.likely, 'student', most),
    ):
        if value > allowed:
            raise ValueError(f'config.record.{name}={value}: expected at most the vocabulary of the {whose}, {allowed}')
    return min(asked, most)


def _words_apart(config: TrainConfig, models: dict[str, Weights], apart: Job | None) -> int:
    assert apart is not None
    return vocabulary_of(config.record, apart.models['model'].cfg.vocab_size, models['model'].cfg.vocab_size)


def _objective(
    config: TrainConfig,
    models: dict[str, Weights],
    compute: Compute,
    targets: RecordedTargets | None,
    second: SecondReader | None,
    apart: Job | None,
) -> Objective:
    cfg = models['model'].cfg
    if cfg.experts is not None:
        cfg = dataclasses.replace(cfg, experts=dataclasses.replace(cfg.experts, capacity=config.router.capacity))
    auxiliary = Auxiliary(config.router, config.mtp_loss)
    distill = config.distill
    if targets is not None or apart is not None:
        seen = targets.manifest.vocab_size if targets is not None else _words_apart(config, models, apart)
        loss = token_loss(distill, (Teacher(seen),), distill.form)
        return language_modeling(cfg, compute, auxiliary, loss, changing(distill))
    if config.task == 'distill':
        teachers = {name: models[name].cfg for name in config.named_teachers()}
        words = None if second is None else words_of(distill, cfg, teachers['teacher'], second)
        shares, dtype = config.teacher_shares(), teacher_dtype(config)
        return logit_distillation(cfg, teachers, compute, distill, auxiliary, shares, dtype, words)
    return language_modeling(cfg, compute, auxiliary)


def _second(config: TrainConfig, mesh: Mesh) -> SecondReader | None:
    """What reads the texts for a teacher with another tokenizer."""
    if config.distill.alignment is not None and mesh.shape['context'] > 1:
        raise ValueError(
            f'mesh.context={mesh.shape["context"]}: with config.distill.alignment a position of the student looks for '
            "the teacher's anywhere in the row: expected 1"
        )
    return open_second(config)


def _targets(config: TrainConfig, models: dict[str, Weights]) -> RecordedTargets | None:
    """What a teacher said, where the job learns from that.

    Raises:
        FileNotFoundError, ValueError: nothing was recorded, or of another teacher or temperature, or words that the
            student has not.
    """
    distill = config.distill
    if distill.targets is None:
        return None
    found = RecordedTargets(distill.targets, more_context=distill.more_context)
    about = found.manifest
    if config.teacher is not None:
        given = open_weights(dataclasses.replace(config.teacher, mtp=False), about.teacher['dtype']).source
        if given is None or fingerprint_of(given) != about.teacher['fingerprint']:
            raise ValueError(
                f'config.teacher.path={config.teacher.path}: {distill.targets} was recorded of '
                f'{about.teacher["path"]}, another model: expected that one, or config.teacher=None'
            )
    if about.vocab_size > models['model'].cfg.vocab_size:
        raise ValueError(
            f'config.distill.targets={distill.targets}: recorded over {about.vocab_size} words, of which the student '
            f'has {models["model"].cfg.vocab_size}: record again with --config.record.vocab_size='
            f'{models["model"].cfg.vocab_size}'
        )
    if about.temperature != distill.temperature:
        raise ValueError(
            f'config.distill.temperature={distill.temperature}: {distill.targets} was recorded at {about.temperature}, '
            'and words that were left out cannot be weighed anew: expected that one, or record again'
        )
    return found


def _abstract_batch(
    config: TrainConfig, targets: RecordedTargets | None, second: SecondReader | None, apart: Job | None
) -> Batch:
    """Shapes of a batch."""
    shape = (config.batch.size, config.batch.length)
    batch = empty_batch(*shape)
    if config.routes():
        batch = batch._replace(route=batch.segment_ids)
    if targets is not None:
        batch = batch._replace(sparse_target=targets.empty(shape))
    if second is not None:
        batch = batch._replace(teacher=second.empty(shape[:1], shape[1]))
    if apart is not None:
        wide = jnp.promote_types(teacher_dtype(config), jnp.float32)
        batch = batch._replace(sparse_target=no_words(shape, config.record.likely, wide))
    return jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch))


def _drawn(config: TrainConfig, name: str, weights: Weights, key: jax.Array) -> Any:
    """Random weights in the canonical layout."""
    return init(weights.cfg, key, config.compute.param_dtype if name == 'model' else teacher_dtype(config))


def _extended(
    config: TrainConfig, weights: dict[str, Weights], models: dict[str, Any], key: jax.Array
) -> dict[str, Any]:
    """The models with what the job trains in or beside them: adapters, projections of pairs of hidden states."""
    lora, model = config.lora, models['model']
    if lora is not None:
        model = add_lora(
            model,
            jax.random.fold_in(key, 0),
            lora.targets,
            rank=lora.rank,
            alpha=lora.alpha,
            rank_stabilized=lora.rank_stabilized,
            place='config.lora.targets',
        )
    if config.quantize is not None:
        model = rounded_model(config, weights['model'].cfg, model, weights['model'].calibrated)
    if config.task == 'distill':
        pairs, own_key, dtype = config.distill.pairs, jax.random.fold_in(key, 1), config.compute.param_dtype
        teachers = {name: weights[name].cfg for name in config.named_teachers() if name in weights}
        drawn = new_projections(pairs, weights['model'].cfg, teachers, own_key, dtype)
        model = model | {BESIDE: drawn} if drawn else model
    return models | {'model': model}


def _trees(config: TrainConfig, models: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The trainable tree and the frozen ones, from whole models; what is beside the model is always trained."""
    freeze, place = config.freeze if config.lora is None else FREEZE_ALL_BUT_LORA, 'config.freeze'
    if models['model'].get('mtp') and not config.mtp_loss:
        freeze, place = (*freeze, 'mtp'), 'config.freeze (with mtp, since config.mtp_loss=0)'
    params, frozen = partition(without_beside(models['model']), freeze, place)
    if BESIDE in models['model']:
        beside = models['model'][BESIDE]
        params, frozen = params | {BESIDE: beside}, frozen | {BESIDE: jax.tree.map(lambda _: None, beside)}
    return params, {'model': frozen} | {name: tree for name, tree in models.items() if name != 'model'}


def without_beside(params: Any) -> Any:
    """A tree of a run's parameters without what is trained beside the model."""
    return {name: part for name, part in params.items() if name != BESIDE}


def _abstract_models(config: TrainConfig, models: dict[str, Weights]) -> dict[str, Any]:
    """Shapes of the models in the canonical layout, as their weights are stored or drawn."""

    def make(key: jax.Array) -> dict[str, Any]:
        return {name: _drawn(config, name, weights, key) for name, weights in models.items()}

    shapes = jax.eval_shape(make, _abstract_key())
    for name, weights in models.items():
        if weights.source is not None:
            for path, packing in weights.source.quantized.items():
                parts = packing.parts(get(shapes[name], path).shape)
                abstract = {part: jax.ShapeDtypeStruct(*spec) for part, spec in parts.items()}
                put(shapes[name], path, packing.assembled(abstract))
    return shapes


def _abstract_key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _plan(config: TrainConfig, models: dict[str, Weights], mesh: Mesh) -> Plan:
    abstract = _abstract_models(config, models)
    extended = jax.eval_shape(functools.partial(_extended, config, models), abstract, _abstract_key())
    params, frozen = _trees(config, extended)
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
    extended = _extended(job.config, job.models, models, key)
    placed = {name: to_device_layout(job.plan.layouts[name], tree) for name, tree in extended.items()}
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
    loaded = {name: _load(job, name) for name, weights in job.models.items() if weights.source is not None}
    drawn = {name: weights for name, weights in job.models.items() if weights.source is None}

    def make(loaded: dict[str, Any], key: jax.Array) -> TrainState:
        draw, rest = jax.random.split(key)
        models = {name: _drawn(job.config, name, weights, draw) for name, weights in drawn.items()}
        return _fresh_state(job, models | loaded, rest)

    return jax.jit(make, out_shardings=places_of(job.state))(loaded, jax.random.key(job.config.seed))


def _load(job: Job, name: str) -> Any:
    """A model's weights in the canonical layout, without adapters; each process reads what its devices hold."""
    source = job.models[name].source
    assert source is not None
    shapes = _abstract_models(job.config, {name: job.models[name]})[name]
    layout = job.plan.layouts[name]
    placed = jax.eval_shape(functools.partial(to_device_layout, layout), shapes)
    specs = param_specs(placed, Rules(job.mesh.shape, units_of(source.cfg), layout.staged))
    return load_tree(source, shardings(job.mesh, storage_specs(specs, shapes, job.mesh.shape)))


def load_placed(job: Job, name: str, shapes: Any) -> Any:
    """A model's weights as its source has them, in the device layout; `shapes` says where each leaf lies."""
    return laid_out(to_device_layout, job.plan.layouts[name], _load(job, name), shapes)


def _kept(state: TrainState) -> TrainState:
    """What a checkpoint holds of a state: all but teachers, whose own checkpoints have them."""
    return state._replace(frozen={'model': state.frozen['model']})


def canonical_shapes(job: Job) -> TrainState:
    """What a checkpoint of this job holds, with the sharding of each leaf while it is saved or restored."""
    kept = _kept(job.state)
    stored = jax.eval_shape(functools.partial(to_canonical_layout, job.plan.layouts['model']), kept)
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, kept)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        stored,
        shardings(job.mesh, storage_specs(specs, stored, job.mesh.shape)),
    )


def canonical(job: Job, state: TrainState) -> TrainState:
    """The state as checkpoints hold it: in the canonical layout, without teachers.

    Where the layouts differ (pipelines, a padded vocabulary) the leaves that change are new arrays, divided over the
    devices like those of the state; all others are the state's own.
    """
    return laid_out(to_canonical_layout, job.plan.layouts['model'], _kept(state), canonical_shapes(job))


def from_canonical(job: Job, kept: TrainState) -> TrainState:
    """The state on its devices, from what a checkpoint held; teachers are read from their own sources."""
    state = laid_out(to_device_layout, job.plan.layouts['model'], kept, _kept(job.state))
    teachers = {name: load_placed(job, name, job.state.frozen[name]) for name in job.models if name != 'model'}
    return state._replace(frozen=state.frozen | teachers)


def trained_parameters(job: Job, state: TrainState, *, averaged: bool = False) -> Any:
    """The trainable leaves in the canonical layout; their moving average if asked, where there is one.

    The average has the dtypes of the parameters, as evaluation scores it.
    """
    params = averaged_parameters(state.ema, state.params) if averaged else state.params
    return laid_out(to_canonical_layout, job.plan.layouts['model'], params, canonical_shapes(job).params)


def whole_model(job: Job, state: TrainState, *, averaged: bool = False) -> Any:
    """The model's parameters in the canonical layout: adapters merged, rounded weights as config.quantize.result."""
    layout, shapes = job.plan.layouts['model'], canonical_shapes(job).frozen['model']
    frozen = laid_out(to_canonical_layout, layout, state.frozen['model'], shapes)
    whole = merge_lora(without_beside(merge(trained_parameters(job, state, averaged=averaged), frozen)))
    return whole if job.config.quantize is None else RESULTS[job.config.quantize.result](whole)
