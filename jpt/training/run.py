"""A whole job: train, export, and where a distillation asks for it, compare with the same student without a teacher."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jpt.checkpoint.assets import open_tokenizer
from jpt.checkpoint.directories import new_directory
from jpt.checkpoint.opening import model_directory, open_model
from jpt.checkpoint.peft import write_adapter
from jpt.checkpoint.source import to_host
from jpt.data.tokenizer import Tokenizer
from jpt.distill.teacher import make_teacher
from jpt.model import Model
from jpt.training.compare import compare
from jpt.training.job import Job, divided, make_job, trained_parameters, whole_model
from jpt.training.loop import make_watchdog, train
from jpt.training.memory import explain_out_of_memory
from jpt.training.overview import overview
from jpt.training.settings import TrainConfig
from jpt.training.state import TrainState
from jpt.training.tokenizers import open_assets

RESULTS = 'results.json'  # which step each result is of


def run_job(config: TrainConfig, workdir: Path) -> Model:
    """Runs a job in its folder and returns the trained model; a run that was stopped goes on where it was.

    Under workdir: checkpoints/, metrics.jsonl, and model/, a Hugging Face directory of the result (of the moving
    average, where the run keeps one); adapter/ where adapters were trained.

    Raises:
        ValueError, FileNotFoundError: settings or files that do not hold, by name, before anything is trained.
    """
    model = train_model(config, workdir)
    if config.compare is not None:
        say('')
        say('The same student on the same tokens, without the teacher:')
        alone = config.without_teacher()
        if alone.tokenizer is None:
            alone = dataclasses.replace(alone, tokenizer=str(model.assets))
        ours, _ = divided(config.teacher_mesh, jax.devices())
        scratch = train_model(alone, workdir / 'scratch', ours)
        say('\nOn held-out text ...')
        with make_watchdog(config, workdir) as dog:
            say(compare(config, model, scratch, workdir, dog))
    return model


def train_model(config: TrainConfig, workdir: Path, devices: Sequence[Any] | None = None) -> Model:
    """One training run and its exported result, on all devices or on those that are given."""
    tokenizer, assets = open_assets(config)
    workdir.mkdir(parents=True, exist_ok=True)
    check_results(config, workdir)
    with make_watchdog(config, workdir) as dog:
        job = make_job(config, devices)
        check_models(job, tokenizer)
        check_teachers(config, tokenizer)
        check_targets(job, tokenizer)
        say(overview(job))
        if job.apart is not None:
            check_models(job.apart, tokenizer, alone='teacher')
            dog.beat(0, 'reading the teacher')
            with explain_out_of_memory({'teacher': job.apart.state.params}):
                job = job._replace(teacher=make_teacher(config, job.apart, job.models['model'].cfg.vocab_size))
        state = train(job, workdir, tokenizer, assets, dog)
        dog.beat(config.steps, 'export')
        cfg, origin = job.models['model'].cfg, job.models['model'].origin
        model = Model(cfg, whole_model(job, state, averaged=True), tokenizer, assets, origin=origin)
        export(job, state, model, workdir)
    return model


def export(job: Job, state: TrainState, model: Model, workdir: Path) -> None:
    """Writes the results of a run beside its checkpoints; every process calls this."""
    config = job.config
    if config.lora is not None:
        adapter = workdir / 'adapter'
        if needed(adapter, config.steps):
            factors = jax.tree.map(to_host, trained_parameters(job, state, averaged=True))
            if jax.process_index() == 0:
                with new_directory(beside(adapter)) as directory:
                    write_adapter(directory, model.config, factors, base_name(config))
                swap_in(adapter, config.steps)
        say(f'saved    {adapter} (a PEFT adapter)')
    if config.checkpoint.export:
        target = workdir / 'model'
        if needed(target, config.steps):
            model.export(beside(target))
            if jax.process_index() == 0:
                swap_in(target, config.steps)
        say(f'saved    {target} (transformers, vLLM and SGLang load it), checkpoints in {workdir / "checkpoints"}')


def base_name(config: TrainConfig) -> str | None:
    """What an adapter names as its base: an absolute path, which holds wherever the adapter is opened."""
    return None if config.model.path is None else str(model_directory(config.model.path).resolve())


def check_results(config: TrainConfig, workdir: Path) -> None:
    """Raises ValueError where something that no run wrote stands in the place of a result of this one."""
    made = _made(workdir)
    for name, writes in (('model', config.checkpoint.export), ('adapter', config.lora is not None)):
        if writes and (workdir / name).exists() and name not in made:
            raise ValueError(f'{workdir / name} is not of this run: expected nothing there; move it, or change workdir')


def needed(result: Path, step: int) -> bool:
    """Whether a result is still to be written, as process 0 sees it; the place `beside` it is then free.

    What it held after fewer steps stays until `swap_in`.
    """
    answer = False
    if jax.process_index() == 0:
        answer = not result.exists() or _made(result.parent).get(result.name) != step
        shutil.rmtree(beside(result), ignore_errors=True)  # of a process that was killed before it swapped
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        answer = bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))
    return answer


def beside(result: Path) -> Path:
    """Where a result is written before it takes the place of an older one."""
    return result.with_name(f'{result.name}.new')


def swap_in(result: Path, step: int) -> None:
    """Gives what lies beside a result its name and removes the older one; for process 0.

    Which step it is of is written down while there is no result, so a run that is killed in between writes it again.
    """
    old = result.with_name(f'{result.name}.old')
    shutil.rmtree(old, ignore_errors=True)
    if result.exists():
        result.rename(old)
    fresh = result.parent / f'.{RESULTS}.incomplete'
    fresh.write_text(json.dumps(_made(result.parent) | {result.name: step}) + '\n')
    fresh.replace(result.parent / RESULTS)
    beside(result).rename(result)
    shutil.rmtree(old, ignore_errors=True)


def _made(workdir: Path) -> dict[str, int]:
    """{result: step} of what runs in this folder wrote."""
    path = workdir / RESULTS
    if not path.exists():
        return {}
    try:
        made = json.loads(path.read_text())
    except ValueError:
        made = None
    if not isinstance(made, dict) or not all(isinstance(step, int) for step in made.values()):
        raise ValueError(f'{path} is damaged: expected an object of results and their steps; move it and the results')
    return made


def say(text: str) -> None:
    """Prints on the first process."""
    if jax.process_index() == 0:
        print(text, flush=True)


def check_targets(job: Job, tokenizer: Tokenizer) -> None:
    """Raises ValueError where a teacher's recorded words are of another tokenizer."""
    if job.targets is None or job.targets.manifest.tokenizer == tokenizer.fingerprint():
        return
    raise ValueError(
        f'config.distill.targets={job.targets.directory}: recorded with another tokenizer '
        f'({job.targets.manifest.tokenizer[:12]}): expected that in {tokenizer.source} ({tokenizer.fingerprint()[:12]})'
    )


def check_models(job: Job, tokenizer: Tokenizer, alone: str = 'model') -> None:
    """Raises ValueError where a tokenizer has ids, or a row positions, for which a model has no embedding.

    alone: what messages call the first model.
    """
    second = job.second
    for given, weights in job.models.items():
        name = alone if given == 'model' else given
        cfg, read, length, setting = weights.cfg, tokenizer, job.config.batch.length, 'batch.length'
        if second is not None and given != 'model':
            read, length, setting = second.tokenizer, second.length, 'distill.alignment.length'
        if cfg.learned_positions and length > cfg.max_length:
            raise ValueError(
                f'config.{setting}={length}: expected at most the {cfg.max_length} positions of the {name}'
            )
        if read.vocab_size > cfg.vocab_size:
            raise ValueError(
                f'the tokenizer in {read.source} has ids up to {read.vocab_size - 1}: expected less than '
                f'vocab_size={cfg.vocab_size} of the {name}'
            )


def check_teachers(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raises ValueError where a teacher has no weights, or a tokenizer of its own that gives other ids.

    A teacher without a tokenizer is taken to have this one. With config.distill.alignment it may have another.
    """
    for name, teacher in config.named_teachers().items():
        if teacher.path is None:
            place = f'config.{"teacher" if teacher is config.teacher else f"teachers.{name}"}'
            raise ValueError(f'{place}.architecture: a teacher needs trained weights: expected {place}.path')
        if config.distill.alignment is not None:
            continue
        theirs = open_tokenizer(open_model(teacher.path).assets)
        if theirs is not None and theirs.fingerprint() != tokenizer.fingerprint():
            raise ValueError(
                f'the {name} {teacher.path} has another tokenizer ({theirs.fingerprint()[:12]}) than the student '
                f'({tokenizer.fingerprint()[:12]}, from {tokenizer.source}): its words are not those of the student; '
                'config.distill.alignment (docs/distill.md) learns from the words that both have'
            )
