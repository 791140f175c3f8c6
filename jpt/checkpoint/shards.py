"""A model's tensors spread over safetensors files: model.safetensors, or shards with model.safetensors.index.json."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np

from jpt.checkpoint.safetensors import SafetensorsFile, TensorSpec
from jpt.checkpoint.safetensors_writer import SafetensorsWriter

SINGLE_FILE = 'model.safetensors'
INDEX_FILE = 'model.safetensors.index.json'
PICKLES = ('.bin', '.pt', '.pth', '.ckpt')
_UNITS = {'': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9, 'TB': 10**12, 'KIB': 2**10, 'MIB': 2**20, 'GIB': 2**30}


class ShardedReader:
    """The tensors of a model directory by name, whichever files they are in.

    Attributes:
        tensors: the spec of every tensor.

    Raises:
        FileNotFoundError: no safetensors there; pickled weights are refused by name.
        ValueError: a damaged file, or an index that does not agree with the shards.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._files: dict[str, SafetensorsFile] = {}
        if (self.directory / INDEX_FILE).is_file():
            self._open_indexed()
        elif (self.directory / SINGLE_FILE).is_file():
            file = SafetensorsFile(self.directory / SINGLE_FILE)
            self._files = dict.fromkeys(file.tensors, file)
        else:
            raise FileNotFoundError(_why_no_weights(self.directory))
        self.tensors = {name: file.tensors[name] for name, file in self._files.items()}

    def _open_indexed(self) -> None:
        path = self.directory / INDEX_FILE
        try:
            weight_map = json.loads(path.read_text('utf-8'))['weight_map']
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{path}: expected a JSON object with a weight_map of tensor to file ({error!r})'
            ) from error
        absent = [name for name in names if not (self.directory / name).is_file()]
        if absent:
            raise FileNotFoundError(f'{path} names shards that are not there: {", ".join(absent)}')
        for name in names:
            file = SafetensorsFile(self.directory / name)
            listed = {tensor for tensor, shard in weight_map.items() if shard == name}
            if listed != set(file.tensors):
                raise ValueError(
                    f'{path} does not agree with {name}: '
                    f'only in the index {sorted(listed - set(file.tensors))[:10]}, '
                    f'only in the shard {sorted(set(file.tensors) - listed)[:10]}'
                )
            self._files.update(dict.fromkeys(file.tensors, file))

    def view(self, name: str) -> np.ndarray:
        """A tensor as a read-only view of its file; nothing is read until it is used."""
        return self._files[name].view(name)

    def fill(self, target: np.ndarray, name: str, index: tuple[slice, ...], transposed: bool = False) -> None:
        """Copies the part of a tensor that `index` selects into `target`, in the dtype of that.

        `transposed`: the last two axes are swapped first; `index` has a slice for each axis of what comes out.
        """
        view = self.view(name)
        target[...] = (view.swapaxes(-1, -2) if transposed else view)[index]

    def release(self, name: str) -> None:
        """Lets the operating system drop a tensor's pages."""
        self._files[name].release(name)

    def largest_file(self) -> int:
        """Bytes of the largest file that holds weights."""
        return max(file.path.stat().st_size for file in self._files.values())


def _why_no_weights(directory: Path) -> str:
    wanted = f'expected {SINGLE_FILE}, or {INDEX_FILE} with its shards'
    if not directory.is_dir():
        return f'{directory}: no such directory; {wanted}'
    pickles = sorted(item.name for item in directory.iterdir() if item.suffix in PICKLES)
    if pickles:
        return (
            f'{directory}: {", ".join(pickles)}: pickled weights can run code when they are opened and are not read; '
            f'{wanted} (transformers writes them by save_pretrained)'
        )
    return f'{directory}: no weights; {wanted}'


def parse_size(text: str | int) -> int:
    """Bytes of a size such as '5GB' (powers of ten), '512MiB' (powers of two) or 1000.

    Raises:
        ValueError: not a size, or not positive.
    """
    match = re.fullmatch(r'\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*', str(text))
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f'size {text!r}: expected a positive number with a unit of {", ".join(_UNITS)[2:]}')
    return max(1, int(float(match[1]) * _UNITS[match[2].upper()]))


def plan_shards(specs: Mapping[str, TensorSpec], max_shard_size: str | int) -> dict[str, dict[str, TensorSpec]]:
    """File name -> tensors, in order, no file above the size except one that holds a single larger tensor."""
    limit = parse_size(max_shard_size)
    shards: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f'model-{n:05d}-of-{len(shards):05d}.safetensors': shard for n, shard in enumerate(shards, start=1)}


class ShardedWriter:
    """Writes a model's tensors, announced beforehand, to as many files as `max_shard_size` asks for, and the index.

    A context manager; tensors may come in any order, whole or in rows. Nothing has its final name before the end.
    """

    def __init__(
        self, directory: str | os.PathLike[str], specs: Mapping[str, TensorSpec], max_shard_size: str | int = '5GB'
    ) -> None:
        self.directory = Path(directory)
        self.shards = plan_shards(specs, max_shard_size)
        self._stack = ExitStack()
        self._writers: dict[str, SafetensorsWriter] = {}

    def __enter__(self) -> 'ShardedWriter':
        with ExitStack() as stack:  # closes the files already opened where a later one fails
            for file, specs in self.shards.items():
                writer = stack.enter_context(SafetensorsWriter(self.directory / file, specs, {'format': 'pt'}))
                self._writers.update(dict.fromkeys(specs, writer))
            self._stack = stack.pop_all()
        return self

    def write(self, name: str, array: np.ndarray, first_row: int = 0) -> None:
        """Writes a tensor, or the rows of it that begin at `first_row`."""
        self._writers[name].write(name, array, first_row)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if kind is None and len(self.shards) > 1:
            text = json.dumps(self._index(), indent=2, sort_keys=True) + '\n'
            (self.directory / INDEX_FILE).write_text(text, 'utf-8')

    def _index(self) -> dict[str, dict[str, int | str]]:
        pairs: Iterator[tuple[str, str, TensorSpec]] = (
            (name, file, spec) for file, specs in self.shards.items() for name, spec in specs.items()
        )
        weight_map: dict[str, int | str] = {}
        total = 0
        for name, file, spec in pairs:
            weight_map[name] = file
            total += spec.nbytes
        return {'metadata': {'total_size': total}, 'weight_map': weight_map}
