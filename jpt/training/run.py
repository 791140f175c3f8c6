"""A whole job: train, export, and where a distillation asks for it, compare with the same student without a teacher."""

import dataclasses
from pathlib import Path

import jax

from jpt.checkpoint.assets import open_tokenizer
from jpt.checkpoint.opening import open_model
from jpt.checkpoint.peft import write_adapter
from jpt.data.tokenizer import Tokenizer
from jpt.model import Model
from jpt.training.compare import compare
from jpt.training.job import Job, adapted_model, make_job, whole_model
from jpt.training.loop import train
from jpt.training.overview import overview
from jpt.training.settings import TrainConfig


def run_job(config: TrainConfig, workdir: Path) -> Model:
    """Runs a job in its folder and returns the trained model; a run that was stopped goes on where it was.

    Under workdir: checkpoints/, metrics.jsonl, and model/, a Hugging Face directory of the result (of the moving
    average, where the run keeps one).

    Raises:
        ValueError, FileNotFoundError: settings or files that do not hold, by name, before anything is trained.
    """
    model = train_model(config, workdir)
    if config.compare is not None:
        say('')
        say('The same student on the same tokens, without the teacher:')
        alone = dataclasses.replace(config, task='pretrain', teacher=None, compare=None)
        if alone.tokenizer is None:
            alone = dataclasses.replace(alone, tokenizer=str(model.assets))
        scratch = train_model(alone, workdir / 'scratch')
        say(compare(config, model, scratch, workdir))
    return model


def train_model(config: TrainConfig, workdir: Path) -> Model:
    """One training run and its exported result."""
    tokenizer, assets = open_assets(config)
    job = make_job(config)
    check_vocabulary(job, tokenizer)
    workdir.mkdir(parents=True, exist_ok=True)
    say(overview(job))
    state = train(job, workdir, tokenizer, assets)
    cfg = job.models['model'].cfg
    model = Model(cfg, whole_model(job, state, averaged=True), tokenizer, assets)
    if config.lora is not None:
        adapter = workdir / 'adapter'
        if not adapter.exists():
            write_adapter(adapter, cfg, adapted_model(job, state), config.model.path)
        say(f'saved    {adapter} (a PEFT adapter)')
    if config.checkpoint.export:
        target = workdir / 'model'
        if not target.exists():
            model.export(target)
        say(f'saved    {target} (transformers, vLLM and SGLang load it), checkpoints in {workdir / "checkpoints"}')
    return model


def say(text: str) -> None:
    """Prints on the first process."""
    if jax.process_index() == 0:
        print(text, flush=True)


def open_assets(config: TrainConfig) -> tuple[Tokenizer, Path]:
    """The tokenizer of a job and the directory that it lies in.

    Raises:
        ValueError: nothing names a tokenizer.
    """
    given = [config.tokenizer, config.model.path, config.teacher.path if config.teacher else None]
    for path in given:
        if path is None:
            continue
        assets = Path(path) if path == config.tokenizer else open_model(path).assets
        tokenizer = open_tokenizer(assets)
        if tokenizer is not None and assets is not None:
            return tokenizer, assets
    raise ValueError('config.tokenizer=None: expected a directory with tokenizer.json, since no model here has one')


def check_vocabulary(job: Job, tokenizer: Tokenizer) -> None:
    """Raises ValueError where the tokenizer has ids, or a row positions, that the model has no embedding for."""
    cfg = job.models['model'].cfg
    if cfg.learned_positions and job.config.batch.length > cfg.max_length:
        raise ValueError(
            f"config.batch.length={job.config.batch.length}: expected at most the model's {cfg.max_length} positions"
        )
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ValueError(
            f'the tokenizer in {tokenizer.source} has ids up to {tokenizer.vocab_size - 1}: expected less than the '
            f"model's vocab_size={cfg.vocab_size}"
        )
