"""A teacher on a mesh, alone in its program: of every position of a batch it says which words it finds likeliest."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpt.data.batch import Batch
from jpt.distill.settings import RecordConfig
from jpt.kernels.likely_words import Likely, likely_words
from jpt.kernels.sparse_target import SparseTarget
from jpt.models.config import ModelConfig
from jpt.models.transformer import final_norm, head_kernel
from jpt.sharding.grads import outputs
from jpt.training.freeze import merge
from jpt.training.job import Job, load_placed, vocabulary_of
from jpt.training.objective import Carry, Counts, Objective, Sums, Tree
from jpt.training.settings import TrainConfig


class TeacherProgram(NamedTuple):
    """A teacher, ready: its job (a model without a student), and the compiled program."""

    job: Job
    vocab_size: int  # words that take part
    params: Any
    run: Any  # jitted (params, Batch [B, T]) -> Likely [B, T, ...]

    def __call__(self, batch: Batch) -> Likely:
        """What the teacher says of a batch of numpy arrays; every process gives the whole batch."""
        placed = jax.tree.map(
            lambda leaf, where: jax.make_array_from_callback(leaf.shape, where, lambda index: leaf[index]),
            batch,
            self.job.batch_shardings,
        )
        return self.run(self.params, placed)

    def answer(self, batch: Batch, shardings: SparseTarget) -> SparseTarget:
        """What it says of a batch that lies on other devices, or in another layout: as arrays where these say."""
        placed = jax.device_put(batch, self.job.batch_shardings)
        return jax.device_put(self.run(self.params, placed).target, shardings)


def make_teacher(config: TrainConfig, job: Job, student: int | None = None) -> TeacherProgram:
    """The teacher of a distillation, from the job of it alone, with its weights; `student`: words of the student.

    Raises:
        ValueError: more words are asked for than it has.
    """
    cfg = job.models['model'].cfg
    vocab_size = vocabulary_of(config.record, cfg.vocab_size, student)
    objective = said(job.objective, cfg, config.record, config.distill.temperature, vocab_size)
    frozen = jax.tree.map(lambda leaf: None, job.state.params)

    def run(params: Any, batch: Batch) -> Likely:
        return outputs(objective, params, {'model': frozen}, batch, job.plan)

    return TeacherProgram(job, vocab_size, load_placed(job, 'model', job.state.params), jax.jit(run))


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
