"""Distillation from a frozen teacher's full logits and hidden states, computed beside the student in one program."""

from typing import Any

import jax

from jpt.data.batch import Batch
from jpt.distill.pairs import add_pairs, check_pairs
from jpt.kernels.distillation_loss import distillation
from jpt.kernels.head_loss import linear_loss
from jpt.models.config import Compute, ModelConfig
from jpt.models.taps import NORMED
from jpt.models.transformer import final_norm, head_kernel, locate
from jpt.sharding.stages import run_layers
from jpt.training.auxiliary import After, Auxiliary, Counts, Sums
from jpt.training.freeze import merge
from jpt.training.objective import (
    Carry,
    Objective,
    Tree,
    first_carry,
    in_tokens,
    token_counts,
    token_weights,
)
from jpt.training.settings import DistillConfig


def logit_distillation(
    student: ModelConfig,
    teacher: ModelConfig,
    compute: Compute,
    distill: DistillConfig = DistillConfig(),  # noqa: B008 (frozen)
    auxiliary: Auxiliary = Auxiliary(),  # noqa: B008 (frozen)
) -> Objective:
    """Divergences from the teacher at temperature T, and cross-entropy: see kernels/distillation_loss.py.

    On top of them the losses of pairs of hidden states, see distill/pairs.py.

    Raises:
        ValueError: the vocabularies differ, or a pair that these models do not have.
    """
    if student.vocab_size != teacher.vocab_size:
        raise ValueError(
            f'teacher vocab_size={teacher.vocab_size}: expected the vocabulary of the student, {student.vocab_size}'
        )
    token_loss = distillation(
        *distill.terms(),
        alpha=distill.alpha,
        temperature=distill.temperature,
        squared=distill.temperature_squared,
        soft_cap=teacher.logit_soft_cap,
    )
    check_pairs(distill.pairs, student, teacher)
    configs = {'student': student, 'teacher': teacher}
    taps = {name: sorted({getattr(pair, name) for pair in distill.pairs}) for name in configs}

    def models(params: Tree, frozen: Tree) -> dict[str, Any]:
        return {'student': merge(params, frozen['model']), 'teacher': frozen['teacher']}

    def counts(batch: Batch) -> Counts:
        return token_counts(batch) | auxiliary.counts(student, batch)

    def first(params: Tree, frozen: Tree, micro: Batch) -> dict[str, Carry]:
        both = models(params, frozen)
        return {name: first_carry(cfg, both[name], micro, compute, taps[name]) for name, cfg in configs.items()}

    def stage(layers: Tree, frozen_layers: Tree, carry: dict[str, Carry], micro: Batch) -> dict[str, Carry]:
        both = models(layers, frozen_layers)
        # A pipeline differentiates a stage in the whole carry: no cotangent goes back through the teacher's layers.
        carry = carry | {'teacher': jax.lax.stop_gradient(carry['teacher'])}
        where = {name: locate(cfg, micro.positions, micro.segment_ids, compute.dtype) for name, cfg in configs.items()}
        return {
            name: Carry(*run_layers(cfg, both[name], *carry[name], where[name], compute))
            for name, cfg in configs.items()
        }

    def last(
        params: Tree, frozen: Tree, carry: dict[str, Carry], micro: Batch, counts: Counts
    ) -> tuple[jax.Array, Sums]:
        """The loss between both models' logits, which exist chunk by chunk only."""
        both = models(params, frozen)
        hidden = {name: final_norm(cfg, both[name], carry[name].hidden_BTD) for name, cfg in configs.items()}
        weights = token_weights(micro, counts)
        result = linear_loss(
            hidden['student'],
            head_kernel(student, both['student']),
            weights,
            {'targets': micro.targets, 'teacher_hidden': hidden['teacher']},
            token_loss,
            shared={'teacher_kernel': head_kernel(teacher, both['teacher'])},
            vocab_size=student.vocab_size,
            soft_cap=student.logit_soft_cap,
        )
        slots = {name: carry[name].taps | {NORMED: hidden[name]} for name in configs}
        result = add_pairs(result, distill.pairs, both['student'], slots['student'], slots['teacher'], weights)
        after = After(both['student'], hidden['student'], carry['student'].router)
        return auxiliary.added(in_tokens(result, counts), student, after, micro, counts, compute)

    return Objective(counts, first, stage, last, auxiliary.reads_load(student))
