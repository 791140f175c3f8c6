"""Where metrics go: a file of JSON lines, TensorBoard, Weights & Biases. The console is in jpt.training.console."""

import importlib.util
import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

Values = Mapping[str, float]


class Writer(Protocol):
    """Takes one row of values after the other."""

    def write(self, step: int, values: Values) -> None:
        """Records the values of a step."""

    def close(self) -> None:
        """Finishes what is open."""


class JsonLines:
    """Appends rows to a file, each a JSON object in one line that is written whole or, if the machine dies, last.

    On opening, lines beyond `last_step` (what a killed run wrote after its last checkpoint) and a torn last line are
    removed, so that a resumed run has each step once. Values that are not finite are named under 'not_finite'.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _keep_until(path, last_step)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, step: int, values: Values) -> None:
        row: dict[str, Any] = {'step': step} | {name: value for name, value in values.items() if math.isfinite(value)}
        if broken := [name for name, value in values.items() if not math.isfinite(value)]:
            row['not_finite'] = broken
        os.write(self._file, (json.dumps(row) + '\n').encode())

    def close(self) -> None:
        os.close(self._file)


class TensorBoard:
    """Scalars for TensorBoard, by tensorboardX; a resumed run hides what came after its checkpoint."""

    def __init__(self, directory: Path, last_step: int) -> None:
        require_package('tensorboardX', 'log.tensorboard')
        import tensorboardX

        self._writer = tensorboardX.SummaryWriter(str(directory), purge_step=last_step + 1)

    def write(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Rows for Weights & Biases; the run's id is kept in the workdir, so that a resumed run continues it."""

    def __init__(self, project: str, workdir: Path, config: Mapping[str, Any]) -> None:
        require_package('wandb', 'log.wandb')
        import wandb

        id_path = workdir / 'wandb_id'
        if not id_path.exists():
            id_path.write_text(uuid.uuid4().hex)
        self._run = wandb.init(
            project=project, id=id_path.read_text(), resume='allow', dir=str(workdir), config=dict(config)
        )

    def write(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def require_package(name: str, setting: str) -> None:
    """Raises a ValueError that names the package where a setting asks for one that is not installed."""
    if importlib.util.find_spec(name) is None:
        raise ValueError(f'{setting} asks for the package {name}, which is not installed: pip install {name}')


def _keep_until(path: Path, last_step: int) -> None:
    kept = []
    lines = path.read_bytes().split(b'\n')
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline was torn
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f'{path}:{number}: not JSON ({error}): move the file away, or repair it') from error
        if row['step'] <= last_step:
            kept.append(line + b'\n')
    temporary = path.with_name(f'.{path.name}.incomplete')
    temporary.write_bytes(b''.join(kept))
    os.replace(temporary, path)
