"""The training loop: batch, step, metrics, evaluation, checkpoint; stops when asked, and goes on where it stopped."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jpt.checkpoint.manager import CheckpointManager
from jpt.data.batch import Batch
from jpt.data.config import DataConfig
from jpt.data.tokenizer import Tokenizer
from jpt.metrics import Metrics, Run, Window, make_writers
from jpt.sharding.watchdog import STOPPED, Watchdog
from jpt.training.ema import averaged
from jpt.training.feed import Feed
from jpt.training.interrupt import Interrupt
from jpt.training.job import Job, canonical, canonical_shapes, first_state, from_canonical
from jpt.training.memory import explain_out_of_memory
from jpt.training.overview import flops_of
from jpt.training.settings import TrainConfig
from jpt.training.state import TrainState
from jpt.training.trace import Trace

BEST, BEST_OF_SCHEDULE = 'eval_loss', 'eval_ce'  # a loss whose weights change says nothing of which step was best


class NotFiniteError(FloatingPointError):
    """A step whose loss or gradient was not finite."""


class StoppedError(SystemExit):
    """The run was asked to stop and saved its state first."""


def train(job: Job, workdir: Path, tokenizer: Tokenizer, assets: Path | None, dog: Watchdog) -> TrainState:
    """Trains from the newest checkpoint in workdir/checkpoints, or from the start, to the last step.

    `dog` watches over the processes of the job, and is told what this one begins.

    Raises:
        StoppedError: on SIGTERM or SIGINT, after saving; the same command goes on from there. At the last step only
            where a comparison follows.
        NotFiniteError: naming the batch, which is saved under workdir.
    """
    config = job.config
    if config.eval.data is not None:
        check_held_out(job, config.eval.data, tokenizer)
    feed = open_feed(job, config.data, tokenizer)
    with contextlib.ExitStack() as stack:
        stack.callback(feed.close)
        manager = stack.enter_context(open_manager(job, workdir, assets))
        dog.beat(0, 'reading weights')
        with explain_out_of_memory(memory_parts(job, job.batch)):
            state, step, window = restore_or_begin(job, manager, feed)
        metrics = make_metrics(job, workdir, step, window)
        stack.callback(metrics.close)
        metrics.say(f'resuming at step {step}' if step else 'starting at step 0')
        asked = stack.enter_context(Interrupt())
        trace = stack.enter_context(Trace(config.log.profile, workdir / 'profile'))
        saver = _Saver(job, manager, feed, metrics)
        previous: tuple[int, Batch] | None = None
        stop: str | None = None
        while step < config.steps:
            dog.beat(step)
            with metrics.timed('data'):
                batch = next(feed)
            step += 1
            with trace.before(step):
                state, sums = _first_or_next(job, metrics, state, batch)
            if note := trace.after(step, sums):
                metrics.say(note)
            check_finite(metrics.push(step, sums), previous, workdir)
            previous = (step, batch)
            last = step == config.steps
            if last or (config.eval.every and step % config.eval.every == 0):
                check_finite(metrics.flush(), previous, workdir)
                saver.scores = evaluate(job, state, tokenizer, metrics, step, dog)
            stop = _asked_to_stop(asked, step)
            if last or stop or step % config.checkpoint.every == 0:
                check_finite(metrics.flush(), previous, workdir)
                dog.beat(step, 'checkpoint')
                saver.save(step, state)
            if stop:
                break
        manager.wait()
        stop = stop or (asked.asked.name if asked.asked else None)  # also while the last step was saved
        if stop and (step < config.steps or config.compare is not None):  # a comparison is more work
            metrics.say(f'asked to stop ({stop}): saved step {step}; the same command goes on from here')
            raise StoppedError(STOPPED)
        metrics.say(f'data     {feed.pipeline.describe()}')
    return state


def check_held_out(job: Job, data: DataConfig, tokenizer: Tokenizer) -> None:
    """Reads the first batch of the held-out data: what is wrong with them is wrong now, not after the last step."""
    with contextlib.closing(open_feed(job, data, tokenizer, evaluate=True)) as feed:
        next(feed.pipeline, None)


def open_feed(job: Job, data: DataConfig, tokenizer: Tokenizer, *, evaluate: bool = False) -> Feed:
    """The batches of a job, or of an evaluation within it: one pass in the order of the files."""
    return Feed(
        data,
        tokenizer,
        job.batch_shardings,
        (job.config.batch.size, job.config.batch.length),
        seed=0 if evaluate else job.config.seed,
        evaluate=evaluate,
        targets=job.targets,
        second=job.second,
        teacher=job.teacher,
        routes=job.config.routes(),
    )


class _Saver:
    """Saves the state, with the scores of the last evaluation where they belong to the same step."""

    def __init__(self, job: Job, manager: CheckpointManager, feed: Feed, metrics: Metrics) -> None:
        self._job, self._manager, self._feed, self._metrics = job, manager, feed, metrics
        self.scores: dict[str, float] | None = None

    def save(self, step: int, state: TrainState) -> None:
        with self._metrics.timed('checkpoint'):
            data = {'feed': self._feed.get_state(), 'window': self._metrics.window()}
            self._manager.save(step, canonical(self._job, state), data=data, metrics=self.scores)
        self.scores = None


def _first_or_next(job: Job, metrics: Metrics, state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
    """A step, announced where it is compiled."""
    with explain_out_of_memory(memory_parts(job, batch)):
        if job.step._cache_size():
            return job.step(state, batch)
        with metrics.compiling():
            return jax.block_until_ready(job.step(state, batch))


def memory_parts(job: Job, batch: Any) -> dict[str, Any]:
    """What a device holds, by the names that an out-of-memory message uses."""
    state = job.state
    parts = {'params': state.params, 'optimizer': state.opt_state, 'frozen': state.frozen, 'average': state.ema}
    beside = {'teacher': job.teacher.params} if job.teacher is not None else {}
    return parts | {'batch': batch, **beside}


def _asked_to_stop(asked: Interrupt, step: int) -> str | None:
    """The signal that this job should stop at, in agreement with all other processes."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        return 'SIGTERM to one of its processes' if multihost_utils.reached_preemption_sync_point(step) else None
    return asked.asked.name if asked.asked else None


def check_finite(values: dict[str, float] | None, batch: tuple[int, Batch] | None, workdir: Path) -> None:
    """Raises NotFiniteError, after saving the batch, where a step was refused."""
    if values is None or batch is None or values['accepted'] == 1:
        return
    step, arrays = batch
    path = workdir / f'refused_batch_{step}_process_{jax.process_index()}.npz'
    local: dict[str, Any] = {name: _local_rows(leaf) for name, leaf in _named(arrays)}
    np.savez(path, **local)
    raise NotFiniteError(
        f'step {step}: loss {values["loss"]}, gradient norm {values["grad_norm"]}: not finite. The update was refused; '
        f'the batch is in {path}, and the newest checkpoint is from before this step.'
    )


def _named(batch: Batch) -> list[tuple[str, jax.Array]]:
    """The arrays of a batch by name; numpy has no file format for bfloat16, so such values are widened."""
    parts = dict(batch._asdict())
    target, teacher = parts.pop('sparse_target'), parts.pop('teacher')
    parts |= {} if target is None else target._asdict()
    parts |= {} if teacher is None else {f'teacher_{name}': leaf for name, leaf in teacher._asdict().items()}
    found = {name: leaf for name, leaf in parts.items() if leaf is not None}
    return [(name, leaf.astype(np.float32) if leaf.dtype.kind == 'V' else leaf) for name, leaf in found.items()]


def _local_rows(leaf: jax.Array) -> np.ndarray:
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    shards = {shard.index: np.asarray(shard.data) for shard in leaf.addressable_shards}
    return np.concatenate([shards[index] for index in sorted(shards, key=str)])


def evaluate(
    job: Job, state: TrainState, tokenizer: Tokenizer, metrics: Metrics, step: int, dog: Watchdog
) -> dict[str, float] | None:
    """Means over the held-out text, written as eval_*, of the moving average if there is one; None without text."""
    settings = job.config.eval
    if settings.data is None:
        return None
    state = state._replace(params=averaged(state.ema, state.params))  # what the run exports in the end
    sums: dict[str, tuple[float, float]] = {}
    with metrics.timed('eval'), contextlib.closing(open_feed(job, settings.data, tokenizer, evaluate=True)) as feed:
        for number, batch in enumerate(feed):
            if settings.batches and number == settings.batches:
                break
            dog.beat(step, f'evaluation, batch {number}')
            for name, (total, count) in jax.device_get(job.eval_step(state, batch)).items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = before[0] + float(total), before[1] + float(count)
    scores = {f'eval_{name}': total / count for name, (total, count) in sums.items() if count}
    metrics.record(step, scores)
    return scores


def open_manager(job: Job, workdir: Path, assets: Path | None) -> CheckpointManager:
    """The checkpoints of a run."""
    settings, schedule = job.config.checkpoint, job.config.distill.schedule
    return CheckpointManager(
        workdir / 'checkpoints',
        max_to_keep=settings.keep,
        best_metric=None if job.config.eval.data is None else BEST if schedule is None else BEST_OF_SCHEDULE,
        model=job.models['model'].cfg,
        assets=assets,
        origin=job.models['model'].origin,
        config=json.loads(json.dumps(dataclasses.asdict(job.config))),
    )


def restore_or_begin(job: Job, manager: CheckpointManager, feed: Feed) -> tuple[TrainState, int, Window]:
    """The newest checkpoint's state, its step and what was measured since its last row, or the first state.

    The feed goes to its place too.

    Raises:
        ValueError: the checkpoint is from after the last step of this job, or has no place in its data.
    """
    if manager.latest_step() is None:
        return first_state(job), 0, {}
    restored = manager.restore(canonical_shapes(job))
    if restored.step > job.config.steps:
        raise ValueError(
            f'{manager.directory}: the checkpoint is at step {restored.step}, beyond config.steps={job.config.steps}: '
            f'expected at least {restored.step} steps, or another workdir'
        )
    if restored.data is None:
        raise ValueError(f'{manager.directory}: step {restored.step} does not say where its data stood')
    feed.set_state(restored.data['feed'])
    return from_canonical(job, restored.state), restored.step, restored.data['window']


def make_metrics(job: Job, workdir: Path, step: int, window: Window) -> Metrics:
    """Console, JSON lines and whatever else the run asks for; `step` and `window` are those of a checkpoint."""
    config = job.config
    writers = make_writers(
        workdir,
        config.steps,
        step,
        tensorboard=config.log.tensorboard,
        wandb_project=config.log.wandb,
        config=dataclasses.asdict(config),
    )
    run = Run(
        total_steps=config.steps,
        tokens_per_step=config.batch.size * config.batch.length,
        flops_per_token=flops_of(job),
        devices=job.mesh.size,
        device_kind=jax.devices()[0].device_kind,
        log_every=config.log.every,
        first_step=step,
    )
    return Metrics(run, writers, window=window)


def make_watchdog(config: TrainConfig, workdir: Path) -> Watchdog:
    """A watchdog over all processes of the job."""
    settings = config.multihost
    return Watchdog(
        os.fspath(workdir),
        jax.process_index(),
        jax.process_count(),
        lost_after=settings.lost_after,
        stuck_after=settings.stuck_after,
    )
