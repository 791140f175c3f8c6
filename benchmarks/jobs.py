"""Training jobs of random models on random tokens, for benchmarks."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jpt.config import config_dict, from_config_dict
from jpt.data.batch import Batch
from jpt.training.job import Job, first_state, make_job
from jpt.training.settings import TrainConfig


def tokens(vocab: int, rows: int, length: int) -> np.ndarray:
    """Random ids [rows, length + 1]."""
    return np.random.default_rng(0).integers(0, vocab, (rows, length + 1)).astype(np.int32)


def random_job(shape: dict[str, Any], rows: int, length: int, devices: Any = None, **values: Any) -> tuple[Job, Batch]:
    """A pretraining job of a model of this shape, and a batch of rows that are one text each."""
    given = {
        'task': 'pretrain',
        'model': {'architecture': shape},
        'data': {'paths': ('stdlib:train',)},
        'batch': {'size': rows, 'length': length},
        'schedule': {'warmup': 10},
        **values,
    }
    job = make_job(from_config_dict(TrainConfig, config_dict(TrainConfig, given), 'config'), devices)
    ids = tokens(shape['vocab_size'], rows, length)
    places = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    batch = Batch(ids[:, :-1], ids[:, 1:], np.ones((rows, length), np.float32), places, np.ones_like(places))
    return job, jax.device_put(batch, job.batch_shardings)


def step_of(job: Job, batch: Batch) -> Callable[[], Any]:
    """A training step of jpt, the state carried along."""
    state = first_state(job)

    def run() -> Any:
        nonlocal state
        state, metrics = job.step(state, batch)
        return metrics

    return run
