"""What a run is about to do, in a few lines: models, data, mesh, bytes."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh

from jpt.data.config import DataConfig
from jpt.data.stdlib_corpus import read_stdlib
from jpt.models.names import BESIDE
from jpt.training.flops import flops_per_token
from jpt.training.job import Job, canonical_shapes, without_beside
from jpt.training.memory import bytes_per_device, gib
from jpt.training.settings import TrainConfig


def count_parameters(tree: Any) -> int:
    """Number of elements in all leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def bytes_by_part(job: Job) -> dict[str, int]:
    """Bytes that one device holds between steps, by part of the state."""
    state = job.state
    parts = {'params': state.params, 'optimizer': state.opt_state, 'frozen': state.frozen, 'average': state.ema}
    return {name: size for name, tree in parts.items() if (size := bytes_per_device(tree))}


def flops_of(job: Job) -> float:
    """Operations per token of a training step: the model's, what is beside it, and a forward pass of every teacher."""
    config = job.config
    trained = None
    if jax.tree.leaves(job.state.frozen['model']):
        trained = without_beside(canonical_shapes(job).params)
    cfg = job.models['model'].cfg
    if not config.mtp_loss:
        cfg = dataclasses.replace(cfg, mtp=())
    model = flops_per_token(cfg, config.batch.length, trained).training
    teachers = [dataclasses.replace(w.cfg, mtp=()) for name, w in job.models.items() if name != 'model']
    read = config.batch.length if job.second is None else job.second.length
    theirs = sum(flops_per_token(cfg, read).forward for cfg in teachers) * read / config.batch.length
    beside = 6 * count_parameters(job.state.params.get(BESIDE))  # products forward, and both of backward
    if config.teacher_mesh is not None and not config.teacher_mesh.devices:  # it has the same devices
        theirs += flops_per_token(job.apart.models['model'].cfg, config.batch.length).forward
    return model + beside + theirs


def describe_data(data: DataConfig) -> str:
    """One line: what is read, and of the standard library how much of it differs from the fixed lists."""
    names = []
    for i, path in enumerate(data.paths):
        name = read_stdlib(path.removeprefix('stdlib:')).describe() if path.startswith('stdlib:') else path
        names.append(f'{name} (weight {data.weights[i]:g})' if data.weights else name)
    kind = 'conversations' if data.is_chat else 'texts'
    return f'{", ".join(names) or "none"}; {kind}, packed {data.packing}'


def describe_mesh(mesh: Mesh) -> str:
    """The axes of a mesh that divide something, and its devices."""
    axes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    shape = ', '.join(f'{axis}={size}' for axis, size in axes.items()) or 'one device'
    return f'{shape} ({mesh.size} x {mesh.devices.flat[0].device_kind})'


def describe_apart(job: Job, config: TrainConfig) -> list[str]:
    """A teacher on a mesh of its own: what it is, what it hands over, and where it runs."""
    assert config.teacher is not None
    assert config.teacher_mesh is not None
    count, kept = count_parameters(job.state.params), config.record
    words = f'{kept.likely} likely words' + (f', at most top_p={kept.top_p:g}' if kept.top_p else '')
    where = 'devices of its own' if config.teacher_mesh.devices else "the student's devices"
    memory = gib(bytes_per_device(job.state.params))
    return [
        f'teacher  {job.models["model"].cfg.family}, {count:,} parameters, from {config.teacher.path}; gives {words}',
        f'         on {where}, {describe_mesh(job.mesh)}; {memory} of weights per device',
    ]


def overview(job: Job) -> str:
    """The plan of a run, for its first lines."""
    config, model = job.config, job.models['model'].cfg
    trained = count_parameters(without_beside(job.state.params))
    frozen = count_parameters(job.state.frozen['model'])
    start = 'random weights' if job.models['model'].source is None else f'from {config.model.path}'
    lines = [f'task     {config.task}', f'model    {model.family}, {trained + frozen:,} parameters, {start}']
    if frozen:
        lines.append(f'trained  {trained:,} parameters; {frozen:,} are frozen')
    if config.quantize is not None:
        calibrated = config.quantize.calibrated
        pairs = ', '.join(f'{pattern} {form}' for pattern, form in config.quantize.recipe)
        recipe = pairs if calibrated is None else f'as {calibrated}'
        recipe += ', gradients clipped' if config.quantize.clipped else ''
        lines.append(f'rounded  {recipe}; gradients {config.quantize.gradients}; ends with {config.quantize.result}')
        if config.quantize.gradients == 'tensor' and config.compute.xla_flags != 'fp8':
            lines.append('         on Hopper its products are those of eight bits with compute.xla_flags=fp8 only')
    for (name, teacher), share in zip(config.named_teachers().items(), config.teacher_shares(), strict=True):
        if name not in job.models:  # what it said is recorded
            continue
        count = count_parameters(job.state.frozen[name])
        part = f'of {config.data.route_key}={name}' if config.routes() else f'{share:.0%} of every divergence'
        which = f' ({name}, {part})' if config.teachers else ''
        lines.append(f'teacher  {job.models[name].cfg.family}, {count:,} parameters, from {teacher.path}{which}')
    if job.apart is not None:
        lines += describe_apart(job.apart, config)
    if job.second is not None:
        words = job.second.shared_words
        lines.append(
            f'aligned  the student has {(words >= 0).sum():,} of the {len(words):,} words of the teacher, which reads '
            f'rows of {job.second.length:,} tokens of its own'
        )
    if config.task == 'distill' and config.distill.pairs:
        maps = count_parameters(job.state.params.get(BESIDE))
        names = ', '.join(f'{pair.weight:g} {pair.name}' for pair in config.distill.pairs)
        lines.append(f'pairs    {names}' + (f'; {maps:,} parameters of projections' if maps else ''))
    if job.targets is not None:
        about = job.targets.manifest
        lines.append(f'targets  {about.words()} of {about.teacher["path"]}, {about.dtype}, in {job.targets.directory}')
    lines.append(f'data     {describe_data(config.data)}')
    lines.append(f'held out {"none" if config.eval.data is None else describe_data(config.eval.data)}')
    tokens = config.batch.size * config.batch.length
    split = f', {config.batch.microbatches} microbatches' if config.batch.microbatches > 1 else ''
    lines.append(
        f'batch    {config.batch.size} x {config.batch.length} = {tokens:,} tokens{split}; '
        f'{config.steps:,} steps, {tokens * config.steps:,} tokens'
    )
    lines.append(f'mesh     {describe_mesh(job.mesh)}')
    sizes = ', '.join(f'{name} {gib(size)}' for name, size in bytes_by_part(job).items())
    lines.append(f'memory   per device between steps: {sizes}')
    flops = flops_of(job)
    work = f'{flops / 1e9:,.2f} GFLOP' if flops >= 1e9 else f'{flops / 1e6:,.2f} MFLOP'
    lines.append(f'work     {work} per token of a step')
    return '\n'.join(lines)
