"""A teacher that reads the same text in tokens of its own: what its words are to the student, and the loss between."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpt.data.alignment import SecondReader
from jpt.data.batch import Batch
from jpt.distill.mixture import token_loss
from jpt.distill.settings import DistillConfig
from jpt.kernels.aligned_loss import AlignedDistillation, AlignedTarget, align_target, aligned_distillation
from jpt.kernels.distillation_loss import Teacher
from jpt.kernels.head_loss import linear_loss
from jpt.kernels.likely_words import likely_words
from jpt.kernels.local import axis_index, axis_size
from jpt.kernels.vocab import VOCAB
from jpt.models.config import ModelConfig
from jpt.models.transformer import head_kernel
from jpt.training.auxiliary import Sums


class SharedWords(NamedTuple):
    """What a teacher's words are to a student: int32 [rows of its table], the student's id or -1; and how many count.

    lacking: bool [rows of the student's table], its words that the teacher has not; special tokens are not among them.
    likely: J, those of the teacher's likeliest words that are looked at. loss: what is made of them.
    """

    table: np.ndarray
    lacking: np.ndarray
    likely: int
    loss: AlignedDistillation


def words_of(distill: DistillConfig, student: ModelConfig, teacher: ModelConfig, reader: SecondReader) -> SharedWords:
    """The words that two models share by their tokenizers; rows without a word are not shared.

    Raises:
        ValueError: more likely words than the teacher has, no word that is shared, a vocabulary that cannot be read.
    """
    assert distill.alignment is not None
    likely = distill.alignment.likely
    if likely > teacher.vocab_size:
        raise ValueError(
            f'config.distill.alignment.likely={likely}: expected at most the vocabulary of the teacher, '
            f'{teacher.vocab_size}'
        )
    found = reader.shared_words[: teacher.vocab_size]
    table = np.full(teacher.vocab_size, -1, np.int32)
    table[: len(found)] = np.where(found < student.vocab_size, found, -1)
    if not (table >= 0).any():
        raise ValueError(
            f'config.distill.alignment: the tokenizers in {reader.student.source} and {reader.tokenizer.source} share '
            'no word: expected vocabularies of the same kind of text'
        )
    lacking = np.zeros(student.vocab_size, bool)
    own = reader.own_words[: student.vocab_size]
    lacking[: len(own)] = own
    # Every word of the student may be in the teacher's tail, whatever the size of its table.
    divergences = token_loss(distill, (Teacher(),), 'tail')
    uld = distill.alignment.uld if lacking.any() else 0.0  # a student without words of its own has nothing to sort
    return SharedWords(table, lacking, likely, aligned_distillation(divergences, uld=uld))


def as_read(micro: Batch) -> Batch:
    """The batch in the teacher's tokens [B, U]: what its layers look at."""
    given = micro.teacher
    return micro._replace(tokens=given.tokens, positions=given.positions, segment_ids=given.segment_ids)


def target_of(
    words: SharedWords,
    configs: Mapping[str, ModelConfig],
    models: Mapping[str, Any],
    hidden: Mapping[str, jax.Array],
    micro: Batch,
) -> AlignedTarget:
    """What the teacher says of every position [B, T] of the student, from its final hidden states [B, U, D]."""
    cfg = configs['teacher']
    said = likely_words(
        jax.lax.stop_gradient(hidden['teacher']),
        head_kernel(cfg, models['teacher']),
        micro.teacher.tokens,
        count=words.likely,
        vocab_size=cfg.vocab_size,
        temperature=words.loss.divergences.temperature,
        soft_cap=cfg.logit_soft_cap,
    )
    return align_target(said.target, micro.teacher.at, words.table)


def aligned_head_loss(
    words: SharedWords,
    student: ModelConfig,
    model: Any,
    hidden: Mapping[str, jax.Array],
    weights_BT: jax.Array,
    args: Mapping[str, Any],
) -> tuple[jax.Array, Sums]:
    """The loss of the student's logits beside args['aligned_target'], from its final hidden states [B, T, D].

    What the loss says of the teacher is a mean over aligned tokens, all else over all.
    """
    kernel = head_kernel(student, model)
    total, sums = linear_loss(
        hidden['student'],
        kernel,
        weights_BT,
        args,
        words.loss,
        shared={'lacking': _rows_here(words.lacking, kernel.shape[0])},
        vocab_size=student.vocab_size,
        soft_cap=student.logit_soft_cap,
    )
    aligned, _ = sums['aligned']
    return total, sums | {name: (sums[name][0], aligned) for name in words.loss.per_aligned}


def _rows_here(column_V: np.ndarray, rows: int) -> jax.Array:
    """A column [rows, 1] of a table: those of its rows that are here where a mesh axis outside cuts them."""
    padded = np.pad(column_V, (0, rows * axis_size(VOCAB) - len(column_V)))
    start = axis_index(VOCAB) * rows
    return jax.lax.dynamic_slice_in_dim(jnp.asarray(padded), start, rows)[:, None]
