"""Checkpoints of a training run: saved in the background, kept by recency and by a metric, restored onto any mesh."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from jpt.checkpoint import about as layout
from jpt.checkpoint.assets import tokenizer_fingerprint
from jpt.checkpoint.manifest import MANIFEST_FILE, CheckpointMismatch, DamagedCheckpoint, verify
from jpt.checkpoint.orbax_items import METRICS, handler_registry, restore_leaves, save_args
from jpt.checkpoint.tree import (
    differences,
    listing,
    named_leaves,
    nest,
    specs_of,
    static_differences,
    statics_of,
)
from jpt.models.config import ModelConfig


class Restored(NamedTuple):
    """What a checkpoint gave back; `state` has the target's structure, or is nested dicts of numpy without a target."""

    step: int
    state: Any
    data: dict[str, Any] | None
    config: dict[str, Any] | None
    model: ModelConfig | None
    metrics: dict[str, float]


class CheckpointManager:
    """Saves and restores the state of a run in numbered steps under one directory.

    Every process of a job makes one and calls it alike. The state is any pytree of arrays, numbers and typed random
    keys; shapes and dtypes are stored as they are, whatever mesh they lie on.

    Args:
        directory: made if absent; of one job alone, since leftovers of saves that were killed are removed.
        max_to_keep: the newest so many are kept; None keeps all.
        best_metric: the checkpoint with the best value of this metric is kept as well.
        best_mode: whether a smaller ('min') or a larger ('max') value is better.
        model: goes into each checkpoint, and must equal the stored one on restore.
        assets: a directory with the tokenizer's files and companions; they go into each checkpoint, and the tokenizer
            must equal the stored one on restore.
        origin: the directory of the model that the weights were read from, for its card; None: from none.
        config: the run's configuration, JSON; kept for the record.
        background: write while training goes on. `save` returns when the arrays have been copied.

    Raises:
        DamagedCheckpoint: the metrics of a step cannot be read; names the files that are not what was saved.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_to_keep: int | None = 3,
        best_metric: str | None = None,
        best_mode: Literal['min', 'max'] = 'min',
        model: ModelConfig | None = None,
        assets: str | os.PathLike[str] | None = None,
        origin: str | os.PathLike[str] | None = None,
        config: Mapping[str, Any] | None = None,
        background: bool = True,
    ) -> None:
        if best_mode not in ('min', 'max'):
            raise ValueError(f"best_mode={best_mode!r}: expected 'min' or 'max'")
        self.directory = Path(directory).absolute()
        self.best_metric, self.best_mode = best_metric, best_mode
        self._model, self._config = model, config
        self._assets = None if assets is None else Path(assets)
        self._origin = None if origin is None else Path(origin)
        self._tokenizer = tokenizer_fingerprint(self._assets)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy(max_to_keep),
            best_fn=self._badness,
            best_mode='min',
            cleanup_tmp_directories=True,
            enable_async_checkpointing=background,
        )
        try:
            self._orbax = ocp.CheckpointManager(self.directory, options=options, handler_registry=handler_registry())
        except ValueError:  # Orbax reads the metrics of all steps, and does not say which are no JSON
            for step in sorted(path for path in self.directory.glob('*') if path.name.isdecimal()):
                verify(step, step / layout.MANIFEST / MANIFEST_FILE)
            raise

    def _policy(self, max_to_keep: int | None) -> Any:
        policies: list[Any] = [checkpoint_managers.LatestN(max_to_keep)]
        if self.best_metric is not None:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=self._badness, reverse=True, n=1, keep_checkpoints_without_metrics=False
                )
            )
        return checkpoint_managers.AnyPreservationPolicy(policies)

    def _badness(self, metrics: Mapping[str, float]) -> float:
        """Smaller for a better checkpoint; infinite where there is no number to compare."""
        value = metrics.get(self.best_metric or '', math.nan)
        return math.inf if math.isnan(value) else value if self.best_mode == 'min' else -value

    def save(
        self,
        step: int,
        state: Any,
        *,
        data: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves a state under the number of its step.

        Args:
            step: not saved yet.
            state: a pytree; its arrays may be donated as soon as this returns.
            data: the state of the data iterator, JSON.
            metrics: numbers by name; must hold `best_metric` if they are given.

        Raises:
            TypeError, ValueError: something that a checkpoint cannot hold, or a step that exists.
        """
        if step in self.all_steps():
            raise ValueError(f'{self.directory}: step {step} is saved already')
        if metrics is not None and self.best_metric is not None and self.best_metric not in metrics:
            raise ValueError(f'metrics {sorted(metrics)}: expected {self.best_metric!r}, which chooses the best')
        leaves = named_leaves(state)
        about = layout.About('training', specs_of(leaves), self._model, self._tokenizer, statics_of(state))
        args = save_args(
            about, leaves, assets=self._assets, origin=self._origin, config=self._config, data=data, with_metrics=True
        )
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        self._orbax.save(step, args=args, metrics=numbers, force=True)

    def all_steps(self) -> list[int]:
        """The steps of all finished checkpoints, ascending."""
        return sorted(self._orbax.all_steps())

    def latest_step(self) -> int | None:
        """The newest finished checkpoint's step; None where there is none."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the best value of `best_metric`; None where no checkpoint has one."""
        ranked = [(self._badness(self._metrics_of(step)), step) for step in self.all_steps()]
        value, step = min(ranked, default=(math.inf, None))
        return None if value == math.inf else step

    def _metrics_of(self, step: int) -> dict[str, float]:
        return _read_json(self.step_directory(step) / METRICS / METRICS) or {}

    def step_directory(self, step: int) -> Path:
        """Where a step's checkpoint lies; `load_model` opens it as a model."""
        return self.directory / str(step)

    def restore(
        self, target: Any = None, *, step: int | None = None, check_files: bool = True, fall_back: bool = False
    ) -> Restored:
        """Reads a checkpoint.

        Args:
            target: a tree like the saved one, of arrays or jax.ShapeDtypeStruct; leaves with a sharding are placed so,
                on any mesh, others become numpy. None: everything as numpy, in nested dicts.
            step: the newest by default.
            check_files: compare all files with their checksums first.
            fall_back: where the newest is damaged, set it aside under the name damaged-STEP and go on with the next
                older one, with a warning; otherwise damage is an error.

        Raises:
            FileNotFoundError: no such checkpoint.
            DamagedCheckpoint: names the files that are not what was saved.
            CheckpointMismatch: names every leaf, field or tokenizer that does not agree; nothing is ever cast.
        """
        self.wait()
        while True:
            number = self.latest_step() if step is None else step
            if number is None or number not in self.all_steps():
                wanted = 'no checkpoint' if number is None else f'no checkpoint of step {number}'
                raise FileNotFoundError(f'{self.directory}: {wanted}; there are {self.all_steps()}')
            try:
                if check_files:
                    self._verify(self.step_directory(number))
                return self._read(number, target)
            except DamagedCheckpoint as error:
                if not fall_back or step is not None:
                    raise
                logging.warning('%s\nSet aside; falling back on an older checkpoint.', error)
                self._set_aside(number)

    def _read(self, step: int, target: Any) -> Restored:
        directory = self.step_directory(step)
        about = layout.read_about(directory)
        self._check_identity(directory, about)
        wanted = dict.fromkeys(about.leaves) if target is None else named_leaves(target)
        if target is not None:
            lines = differences(about.leaves, specs_of(wanted))
            lines += static_differences(about.statics, statics_of(target))
            if lines:
                raise CheckpointMismatch(f'{directory} does not fit the state to restore:\n  {listing(lines)}')
        leaves = restore_leaves(directory, about.leaves, wanted)
        if target is None:
            state: Any = nest(leaves)
        else:
            state = jax.tree.unflatten(jax.tree.structure(target), list(leaves.values()))
        return Restored(
            step,
            state,
            _read_json(directory / layout.DATA / layout.DATA_FILE),
            _read_json(directory / layout.CONFIG / layout.CONFIG_FILE),
            about.model,
            self._metrics_of(step),
        )

    def _check_identity(self, directory: Path, about: layout.About) -> None:
        lines = []
        if self._model is not None and about.model is not None:
            lines = layout.model_differences(about.model, self._model)
        if None not in (self._tokenizer, about.tokenizer) and self._tokenizer != about.tokenizer:
            lines.append(f'tokenizer: {about.tokenizer} in the checkpoint, expected {self._tokenizer} ({self._assets})')
        if lines:
            raise CheckpointMismatch(f'{directory} is of another model:\n  {listing(lines)}')

    def _verify(self, directory: Path) -> None:
        """All processes read their share of the files, and all of them learn of a fault."""
        fault = None
        try:
            verify(directory, directory / layout.MANIFEST / MANIFEST_FILE, (jax.process_index(), jax.process_count()))
        except DamagedCheckpoint as error:
            fault = error
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            faults = multihost_utils.process_allgather(jax.numpy.asarray(fault is not None))
            if fault is None and faults.any():
                fault = DamagedCheckpoint(f'{directory}: damaged, see the message of process {int(faults.argmax())}')
        if fault is not None:
            raise fault

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            self.step_directory(step).rename(self.directory / f'damaged-{step}')
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices('jpt.checkpoint.set_aside')
        self._orbax.reload()

    def wait(self) -> None:
        """Blocks until a save in the background is finished; raises what went wrong in it."""
        self._orbax.wait_until_finished()

    def close(self) -> None:
        """Finishes what is being saved and releases threads."""
        self._orbax.close()

    def __enter__(self) -> 'CheckpointManager':
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text('utf-8')) if path.is_file() else None
