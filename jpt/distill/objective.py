"""Distillation from full logits and hidden states of frozen teachers, computed beside the student in one program."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpt.data.batch import Batch
from jpt.distill.aligned import SharedWords, aligned_head_loss, as_read, target_of
from jpt.distill.mixture import changing, token_loss
from jpt.distill.pairs import add_pairs, check_pairs, taps_of
from jpt.distill.settings import DistillConfig
from jpt.kernels.distillation_loss import Teacher, own_name
from jpt.kernels.head_loss import linear_loss
from jpt.kernels.token_losses import TokenLoss
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
    for_all_tokens,
    in_tokens,
    loss_args,
    token_counts,
    token_weights,
    weights_at,
)


def logit_distillation(
    student: ModelConfig,
    teachers: Mapping[str, ModelConfig],
    compute: Compute,
    distill: DistillConfig = DistillConfig(),  # noqa: B008 (frozen)
    auxiliary: Auxiliary = Auxiliary(),  # noqa: B008 (frozen)
    shares: Sequence[float] = (1.0,),
    teacher_dtype: str | None = None,
    words: SharedWords | None = None,
) -> Objective:
    """Divergences from teachers at temperature T, and cross-entropy: see kernels/distillation_loss.py.

    On top of them the losses of pairs of hidden states, see distill/pairs.py.

    teachers: by their names in `frozen`. shares: of each in every divergence, in all 1; where a batch has routes, a
    token has its own teacher alone, in divergences and pairs. teacher_dtype: of the teachers' activations and products,
    where it is another than `compute` says. words: of one teacher whose tokenizer is another, see
    kernels/aligned_loss.py; it reads the batch's `teacher`.

    Raises:
        ValueError: a pair that these models do not have.
    """
    seen = tuple(Teacher(cfg.vocab_size, cfg.logit_soft_cap, name) for name, cfg in teachers.items())
    loss = token_loss(distill, seen)
    check_pairs(distill.pairs, student, teachers)
    configs = {'student': student, **teachers}
    beside = dataclasses.replace(compute, dtype=teacher_dtype or compute.dtype)
    computes = {'student': compute, **dict.fromkeys(teachers, beside)}
    taps = {name: taps_of(distill.pairs, name) for name in configs}

    def models(params: Tree, frozen: Tree) -> dict[str, Any]:
        return {'student': merge(params, frozen['model']), **{name: frozen[name] for name in teachers}}

    def read(name: str, micro: Batch) -> Batch:
        return as_read(micro) if words is not None and name != 'student' else micro

    def counts(batch: Batch, step: Any = 0) -> Counts:
        return token_counts(batch) | auxiliary.counts(student, batch) | weights_at(changing(distill), step, batch)

    def first(params: Tree, frozen: Tree, micro: Batch) -> dict[str, Carry]:
        both = models(params, frozen)
        return {
            name: first_carry(cfg, both[name], read(name, micro), computes[name], taps[name])
            for name, cfg in configs.items()
        }

    def stage(layers: Tree, frozen_layers: Tree, carry: dict[str, Carry], micro: Batch) -> dict[str, Carry]:
        both = models(layers, frozen_layers)
        # A pipeline differentiates a stage in the whole carry: no cotangent goes back through a teacher's layers.
        carry = carry | {name: jax.lax.stop_gradient(carry[name]) for name in teachers}

        def run(name: str, cfg: ModelConfig) -> Carry:
            seen = read(name, micro)
            where = locate(cfg, seen.positions, seen.segment_ids, computes[name].dtype)
            return Carry(*run_layers(cfg, both[name], *carry[name], where, computes[name]))

        return {name: run(name, cfg) for name, cfg in configs.items()}

    def last(
        params: Tree, frozen: Tree, carry: dict[str, Carry], micro: Batch, counts: Counts
    ) -> tuple[jax.Array, Sums]:
        """The loss between both models' logits, which exist chunk by chunk only."""
        both = models(params, frozen)
        hidden = {name: final_norm(cfg, both[name], carry[name].hidden_BTD) for name, cfg in configs.items()}
        weights = token_weights(micro, counts)
        args = loss_args(micro, counts)
        if len(teachers) > 1:
            args['share'] = _shares(shares, micro, weights.dtype)
        if words is None:
            result = _head_loss(configs, both, hidden, weights, args, loss)
        else:
            args['aligned_target'] = target_of(words, configs, both, hidden, micro)
            result = aligned_head_loss(words, configs['student'], both['student'], hidden, weights, args)
        slots = {name: carry[name].taps | {NORMED: hidden[name]} for name in configs}
        result = add_pairs(result, distill.pairs, both['student'], slots, _own(weights, micro, list(teachers)))
        after = After(both['student'], hidden['student'], carry['student'].router)
        total, sums = in_tokens(result, counts)
        result = total, _by_teacher(sums, list(teachers)) if len(teachers) > 1 else sums
        return auxiliary.added(result, student, after, micro, counts, compute)

    return Objective(counts, first, stage, last, auxiliary.reads_load(student))


def _head_loss(
    configs: Mapping[str, ModelConfig],
    models: Mapping[str, Any],
    hidden: Mapping[str, jax.Array],
    weights_BT: jax.Array,
    args: Mapping[str, Any],
    loss: TokenLoss,
) -> tuple[jax.Array, Sums]:
    """The loss of the student's logits beside its teachers', from final hidden states [B, T, D], all by name."""
    student, teachers = configs['student'], [name for name in configs if name != 'student']
    return linear_loss(
        hidden['student'],
        head_kernel(student, models['student']),
        weights_BT,
        {**args, 'teacher_hidden': tuple(hidden[name] for name in teachers)},
        loss,
        shared={'teacher_kernel': tuple(head_kernel(configs[name], models[name]) for name in teachers)},
        vocab_size=student.vocab_size,
        soft_cap=student.logit_soft_cap,
    )


def _shares(shares: Sequence[float], micro: Batch, dtype: Any) -> jax.Array:
    """How much of every token's divergences is against each teacher [B, T, teachers]."""
    if micro.route is None:
        return for_all_tokens(jnp.asarray(shares, dtype), micro)
    return jax.nn.one_hot(micro.route, len(shares), dtype=dtype)


def _own(weights_BT: jax.Array, micro: Batch, teachers: list[str]) -> dict[str, jax.Array]:
    """The weights [B, T] of every teacher's tokens: all, or where these are routed its own."""
    if micro.route is None:
        return dict.fromkeys(teachers, weights_BT)
    return {name: jnp.where(micro.route == number, weights_BT, 0) for number, name in enumerate(teachers)}


def _by_teacher(sums: Sums, teachers: list[str]) -> Sums:
    """Metrics of single teachers as means over their own tokens."""
    own: Sums = {}
    for teacher in teachers:
        share, _ = sums[own_name('share', teacher)]
        names = [name for name in sums if name.endswith(own_name('', teacher)) and not name.startswith('share')]
        own |= {name: (sums[name][0], share) for name in names}
    return sums | own
