"""Distillation from full logits and hidden states of frozen teachers, computed beside the student in one program."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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


class _Models(NamedTuple):
    """Student and teachers, in one program and by name: how each is computed, and what of it pairs look at."""

    configs: dict[str, ModelConfig]  # the student first
    computes: dict[str, Compute]
    taps: dict[str, list[str]]
    words: SharedWords | None  # of a teacher with another tokenizer

    @property
    def teachers(self) -> list[str]:
        return [name for name in self.configs if name != 'student']

    def trees(self, params: Tree, frozen: Tree) -> dict[str, Any]:
        """The parameters of each, or those of a run of its layers."""
        return {'student': merge(params, frozen['model']), **{name: frozen[name] for name in self.teachers}}

    def begin(self, trees: Mapping[str, Any], micro: Batch) -> dict[str, Carry]:
        """What enters the first layers."""
        return {
            name: first_carry(cfg, trees[name], self._read(name, micro), self.computes[name], self.taps[name])
            for name, cfg in self.configs.items()
        }

    def run(self, trees: Mapping[str, Any], carry: dict[str, Carry], micro: Batch) -> dict[str, Carry]:
        """The carry behind a run of layers of each."""
        # A pipeline differentiates a stage in the whole carry: no cotangent goes back through a teacher's layers.
        carry = carry | {name: jax.lax.stop_gradient(carry[name]) for name in self.teachers}
        found = {}
        for name, cfg in self.configs.items():
            seen, compute = self._read(name, micro), self.computes[name]
            where = locate(cfg, seen.positions, seen.segment_ids, compute.dtype)
            found[name] = Carry(*run_layers(cfg, trees[name], *carry[name], where, compute))
        return found

    def loss(
        self,
        trees: Mapping[str, Any],
        hidden: Mapping[str, jax.Array],
        micro: Batch,
        counts: Counts,
        loss: TokenLoss,
        shares: Sequence[float],
    ) -> tuple[jax.Array, Sums]:
        """That of the student's logits beside its teachers', which exist chunk by chunk only."""
        weights, args, student = token_weights(micro, counts), loss_args(micro, counts), self.configs['student']
        if self.words is not None:
            args['aligned_target'] = target_of(self.words, self.configs, trees, hidden, micro)
            return aligned_head_loss(self.words, student, trees['student'], hidden, weights, args)
        args['teacher_hidden'] = tuple(hidden[name] for name in self.teachers)
        if len(self.teachers) > 1:
            args['share'] = _shares(shares, micro, weights.dtype)
        return linear_loss(
            hidden['student'],
            head_kernel(student, trees['student']),
            weights,
            args,
            loss,
            shared={'teacher_kernel': tuple(head_kernel(self.configs[name], trees[name]) for name in self.teachers)},
            vocab_size=student.vocab_size,
            soft_cap=student.logit_soft_cap,
        )

    def _read(self, name: str, micro: Batch) -> Batch:
        return as_read(micro) if self.words is not None and name != 'student' else micro


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
    check_pairs(distill.pairs, student, teachers)
    loss = token_loss(
        distill, tuple(Teacher(cfg.vocab_size, cfg.logit_soft_cap, name) for name, cfg in teachers.items())
    )
    configs = {'student': student, **teachers}
    beside = dataclasses.replace(compute, dtype=teacher_dtype or compute.dtype)
    computes = {'student': compute, **dict.fromkeys(teachers, beside)}
    models = _Models(configs, computes, {name: taps_of(distill.pairs, name) for name in configs}, words)

    def counts(batch: Batch, step: Any = 0) -> Counts:
        return token_counts(batch) | auxiliary.counts(student, batch) | weights_at(changing(distill), step, batch)

    def first(params: Tree, frozen: Tree, micro: Batch) -> dict[str, Carry]:
        return models.begin(models.trees(params, frozen), micro)

    def stage(layers: Tree, frozen_layers: Tree, carry: dict[str, Carry], micro: Batch) -> dict[str, Carry]:
        return models.run(models.trees(layers, frozen_layers), carry, micro)

    def last(
        params: Tree, frozen: Tree, carry: dict[str, Carry], micro: Batch, counts: Counts
    ) -> tuple[jax.Array, Sums]:
        """The loss of logits and of pairs, and of what is beside the student."""
        trees = models.trees(params, frozen)
        hidden = {name: final_norm(cfg, trees[name], carry[name].hidden_BTD) for name, cfg in configs.items()}
        result = models.loss(trees, hidden, micro, counts, loss, shares)
        slots = {name: carry[name].taps | {NORMED: hidden[name]} for name in configs}
        weights = _own(token_weights(micro, counts), micro, models.teachers)
        total, sums = in_tokens(add_pairs(result, distill.pairs, trees['student'], slots, weights), counts)
        result = total, _by_teacher(sums, models.teachers) if len(teachers) > 1 else sums
        after = After(trees['student'], hidden['student'], carry['student'].router)
        return auxiliary.added(result, student, after, micro, counts, compute)

    return Objective(counts, first, stage, last, auxiliary.reads_load(student))


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
