"""A teacher on a mesh that says, of every position of a batch, which words it finds likeliest."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpt.data.batch import Batch
from jpt.kernels.likely_words import Likely, likely_words
from jpt.models.config import ModelConfig
from jpt.models.transformer import final_norm, head_kernel
from jpt.sharding.grads import outputs
from jpt.training.freeze import merge
from jpt.training.job import Job, load_placed, make_job
from jpt.training.objective import Carry, Counts, Objective, Sums, Tree
from jpt.training.settings import DistillConfig, ModelSource, RecordConfig, RouterConfig, TrainConfig


class Recorder(NamedTuple):
    """A teacher, ready: its job (a model without a student), and the compiled program."""

    job: Job
    vocab_size: int  # words that take part
    params: Any
    run: Any  # jitted (params, Batch of numpy arrays [B, T]) -> Likely [B, T, ...]

    def __call__(self, batch: Batch) -> Likely:
        """What the teacher says of a batch; every process gives the whole batch."""
        placed = jax.tree.map(
            lambda leaf, where: jax.make_array_from_callback(leaf.shape, where, lambda index: leaf[index]),
            batch,
            self.job.batch_shardings,
        )
        return self.run(self.params, placed)


def make_recorder(config: TrainConfig, devices: Any = None) -> Recorder:
    """The teacher of a distillation on the job's mesh, with its weights.

    Raises:
        ValueError: a job without a teacher, a pipeline, or what `make_job` refuses.
    """
    job = make_job(as_teacher(config), devices)
    cfg = job.models['model'].cfg
    for name in ('likely', 'vocab_size'):
        value = getattr(config.record, name)
        if value is not None and value > cfg.vocab_size:
            raise ValueError(
                f'config.record.{name}={value}: expected at most the vocabulary of the teacher, {cfg.vocab_size}'
            )
    vocab_size = config.record.vocab_size or cfg.vocab_size
    objective = said(job.objective, cfg, config.record, config.distill.temperature, vocab_size)
    frozen = jax.tree.map(lambda leaf: None, job.state.params)

    def run(params: Any, batch: Batch) -> Likely:
        return outputs(objective, params, {'model': frozen}, batch, job.plan)

    return Recorder(job, vocab_size, load_placed(job, 'model', job.state.params), jax.jit(run))


def as_teacher(config: TrainConfig) -> TrainConfig:
    """The job of a teacher alone, on the mesh of a distillation; nothing of it is trained.

    Raises:
        ValueError: the job has no teacher, or one with another tokenizer, or its mesh a pipeline.
    """
    if config.teacher is None:
        raise ValueError('config.teacher=None: expected the model whose words are to be recorded')
    if config.teacher.path is None:
        raise ValueError('config.teacher.architecture: a teacher needs trained weights: expected config.teacher.path')
    if config.distill.alignment is not None:
        raise ValueError(
            f'config.distill.alignment={config.distill.alignment}: what a teacher says is recorded of its own tokens: '
            'expected None, and a student with its tokenizer'
        )
    if config.mesh.pipe != 1:
        raise ValueError(
            f'config.mesh.pipe={config.mesh.pipe}: a teacher is recorded without a pipeline: expected 1 '
            '(--config.mesh.pipe=1), and the devices in data, fsdp, expert, context or tensor'
        )
    return dataclasses.replace(
        config,
        task='pretrain',
        model=ModelSource(config.teacher.path, config.teacher.architecture, config.teacher.layers, mtp=False),
        teacher=None,
        distill=DistillConfig(),
        compare=None,
        lora=None,
        freeze=(),
        ema=None,
        mtp_loss=0.0,
        router=RouterConfig(),
        compute=dataclasses.replace(config.compute, param_dtype=config.compute.dtype),
    )


def said(
    objective: Objective, cfg: ModelConfig, record: RecordConfig, temperature: float, vocab_size: int
) -> Objective:
    """An objective whose `last` gives the likeliest words in place of metrics, and no loss."""

    def last(params: Tree, frozen: Tree, carry: Carry, micro: Batch, counts: Counts) -> tuple[jax.Array, Sums]:
        """No loss, and the likeliest words of every token."""
        del counts
        model = merge(params, frozen['model'])
        found: Any = likely_words(
            final_norm(cfg, model, carry.hidden_BTD),
            head_kernel(cfg, model),
            micro.targets,
            count=record.likely,
            vocab_size=vocab_size,
            temperature=temperature,
            top_p=record.top_p,
            at_least=record.at_least,
            soft_cap=cfg.logit_soft_cap,
        )
        return jnp.zeros(()), found

    return objective._replace(last=last)
