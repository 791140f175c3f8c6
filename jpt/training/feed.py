"""Batches of a pipeline as arrays on the mesh, with a place to resume from."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jpt.data.alignment import SecondReader
from jpt.data.batch import Batch
from jpt.data.config import DataConfig
from jpt.data.pipeline import Pipeline, make_pipeline
from jpt.data.recorded import RecordedTargets
from jpt.data.tokenizer import Tokenizer
from jpt.distill.teacher import TeacherProgram


class Feed:
    """An iterator of global batches [B, T] on devices, with what the settings below add to the tokens.

    Each process makes only its own rows where rows are divided evenly over processes, and all rows where several
    processes hold the same ones (tensor or pipeline parallelism across hosts).
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        shardings: Batch,
        shape: tuple[int, int],
        *,
        seed: int = 0,
        evaluate: bool = False,
        targets: RecordedTargets | None = None,
        teacher: TeacherProgram | None = None,
        second: SecondReader | None = None,
        routes: Sequence[str] = (),
    ) -> None:
        self._shardings, self._shape, self._teacher = shardings, shape, teacher
        rows = rows_of_process(shardings.tokens, shape)
        count = jax.process_count()
        self._own = rows == slice(*(shape[0] // count * (jax.process_index() + side) for side in (0, 1)))
        self.pipeline: Pipeline = make_pipeline(
            config,
            tokenizer,
            batch_size=shape[0],
            seq_len=shape[1],
            seed=seed,
            process_index=jax.process_index() if self._own else 0,
            process_count=count if self._own else 1,
            evaluate=evaluate,
            targets=targets,
            second=second,
            routes=routes,
        )

    def __iter__(self) -> 'Feed':
        return self

    def __next__(self) -> Batch:
        if self._teacher is None:
            return jax.tree.map(self._place, next(self.pipeline), self._shardings)
        batch = jax.tree.map(self._place, next(self.pipeline), self._shardings._replace(sparse_target=None))
        return batch._replace(sparse_target=self._teacher.answer(batch, self._shardings.sparse_target))

    def _place(self, leaf: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
        shape = (self._shape[0], *leaf.shape[1:])
        if self._own:
            return jax.make_array_from_process_local_data(where, leaf, shape)
        return jax.make_array_from_callback(shape, where, lambda index: leaf[index])

    def get_state(self) -> dict[str, Any]:
        """Where the next batch comes from; the same on every process."""
        return self.pipeline.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a saved place."""
        self.pipeline.set_state(state)

    def close(self) -> None:
        """Ends the background threads."""
        self.pipeline.close()


def rows_of_process(sharding: jax.sharding.Sharding, shape: tuple[int, int]) -> slice:
    """The first and last row of a batch that this process's devices hold."""
    places = sharding.addressable_devices_indices_map(shape).values()
    held = [index[0].indices(shape[0]) for index in places if index is not None]
    return slice(min(first for first, _, _ in held), max(last for _, last, _ in held))
