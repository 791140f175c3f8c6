"""jpt checkpoints as models: saving one, loading one, and taking the model out of a training run."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from jpt.checkpoint import about as layout
from jpt.checkpoint.array_store import Streamed, open_array, write_state
from jpt.checkpoint.assets import copy_companions, has_tokenizer, tokenizer_fingerprint
from jpt.checkpoint.dequantized import numbers_at
from jpt.checkpoint.directories import check_absent, new_directory
from jpt.checkpoint.dtypes import cast, cast_target, is_floating
from jpt.checkpoint.manifest import MANIFEST_FILE, verify, write_manifest
from jpt.checkpoint.source import Index, LeafSource, TreeSource, leaves_of, load_tree, merged, whole
from jpt.checkpoint.tree import LeafSpec, differences, listing, name_of, specs_of
from jpt.models.config import ModelConfig
from jpt.models.names import BESIDE, Leaf, leaves
from jpt.quant.formats import Format
from jpt.quant.packing import Packing
from jpt.quant.tensors import STATIC

PARAMS, FROZEN = 'params/', 'frozen/model/'
STEPS = 'checkpoints'  # where a training run keeps its steps, under its workdir


def is_jpt_directory(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a jpt checkpoint: a model, a step of a training run, or a run with a finished step."""
    try:
        find_checkpoint(path)
    except FileNotFoundError:
        return False
    return True


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that a path means: itself, or the newest finished step of a training run or its workdir.

    Raises:
        FileNotFoundError: none of these.
    """
    directory = Path(path)
    if layout.is_checkpoint(directory):
        return directory
    for parent in (directory / STEPS, directory):
        steps = [child for child in parent.glob('*') if child.name.isdecimal() and layout.is_checkpoint(child)]
        if steps:
            return max(steps, key=lambda step: int(step.name))
    raise FileNotFoundError(
        f'{directory} is not a jpt checkpoint: expected {layout.MODEL}/{layout.MODEL_FILE} in it, or steps of a '
        f'training run in it or in {STEPS}/'
    )


class StoredSource:
    """The model in a jpt checkpoint as a source of leaves.

    Of a training step it takes trainable and frozen leaves alike, and merges LoRA adapters into their kernels. What was
    trained beside the model is left out.

    Args:
        path: as `find_checkpoint` takes it.
        dtype: cast floating-point weights; None keeps what is stored.
        check_files: compare the files with their checksums first.

    Raises:
        FileNotFoundError: no jpt checkpoint.
        DamagedCheckpoint: names files that are not what was saved.
        ValueError: it does not hold a whole model; the message names the leaves.
    """

    def __init__(
        self, path: str | os.PathLike[str], dtype: DTypeLike | None = None, *, check_files: bool = True
    ) -> None:
        self.directory = find_checkpoint(path)
        self._target = cast_target(dtype)
        if check_files:
            verify(self.directory, self.directory / layout.MANIFEST / MANIFEST_FILE)
        about = layout.read_about(self.directory)
        if about.model is None:
            raise ValueError(f'{self.directory}: it names no model config, so it cannot be loaded as a model')
        self.cfg = about.model
        self._names: dict[str, str] = {}  # of a leaf of the model -> in the state
        for prefix in (FROZEN, PARAMS):
            self._names |= {name.removeprefix(prefix): name for name in about.leaves if name.startswith(prefix)}
        self._names = {leaf: name for leaf, name in self._names.items() if not leaf.startswith(f'{BESIDE}/')}
        # A kernel that is trained through its rounding is the weight that is rounded.
        rounded = [leaf.removesuffix('weight') for leaf in self._names if leaf.endswith('/weight')]
        beside = {leaf + name for leaf in rounded for name in STATIC}
        self._names = {leaf.removesuffix('/weight'): at for leaf, at in self._names.items() if leaf not in beside}
        self._specs, self._statics = about.leaves, about.statics
        self._packings = {leaf: self._packing(name) for leaf, name in self._quantized_names().items()}
        paths = {name_of(leaf.path): leaf.path for leaf in leaves(self.cfg)}
        self.quantized = {paths[name]: packing for name, packing in self._packings.items() if name in paths}
        self._check_leaves()
        self._stores: dict[str, Any] = {}

    def _quantized_names(self) -> dict[str, str]:
        """Weights that are held as codes and scales, also below an adapter: by name in the model, the stored name."""
        codes = {name.removesuffix('/codes'): stored for name, stored in self._names.items() if name.endswith('/codes')}
        return {name: stored.removesuffix('/codes') for name, stored in codes.items()}

    def _packing(self, stored: str) -> Packing:
        """How a weight is quantized, by its name in the state."""
        try:
            form, dtype = Format(**self._statics[f'{stored}/format']), self._statics[f'{stored}/weight_dtype']
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f'{self.directory}: {stored} has codes, but no format that jpt reads: {error}') from error
        return Packing(form, dtype, *(f'{stored}/{part}' in self._specs for part in ('input_scale', 'input_factor')))

    def _check_leaves(self) -> None:
        """Every leaf of the model, as an array, in parts, or as a kernel with an adapter, and no other."""
        stored = {name: self._specs[whole] for name, whole in self._names.items()}
        wanted: dict[str, LeafSpec] = {}
        for leaf in leaves(self.cfg):
            name = name_of(leaf.path)
            if {name + '/base', name + '/base/codes'} & set(stored):
                factors = [stored.get(f'{name}/{factor}', LeafSpec('float32', ())) for factor in 'ab']
                wanted |= dict(zip([f'{name}/a', f'{name}/b'], factors, strict=True))
                name += '/base'
            if name in self._packings:
                parts = self._packings[name].parts(leaf.shape)
                wanted |= {f'{name}/{part}': LeafSpec(str(spec.dtype), spec.shape) for part, spec in parts.items()}
            else:
                wanted[name] = LeafSpec(stored[name].dtype if name in stored else 'an array', leaf.shape)
        lines = differences(stored, wanted)
        if lines:
            raise ValueError(f'{self.directory}: not the weights of its {self.cfg.family} model:\n  {listing(lines)}')

    @property
    def assets(self) -> Path | None:
        """The directory with tokenizer files and companions; None where there are none."""
        directory = self.directory / layout.ASSETS
        return directory if directory.is_dir() else None

    def dtype(self, leaf: Leaf) -> np.dtype:
        name = name_of(leaf.path)
        packing = self._packings.get(f'{name}/base')
        if packing is None:
            stored = np.dtype(self._specs[self._names.get(name) or self._names[f'{name}/base']].dtype)
        else:
            stored = np.dtype(packing.weight_dtype)
        return self._target if self._target is not None and is_floating(stored) and leaf.castable else stored

    def read(self, leaf: Leaf, index: Index) -> np.ndarray:
        name = name_of(leaf.path)
        array = self._part(name, index) if name in self._names else self._merged(name, leaf.shape, index)
        return cast(array, self._target if leaf.castable else None)

    def _part(self, name: str, index: Index) -> np.ndarray:
        stored = self._names[name]
        if stored not in self._stores:
            if len(self._stores) > 8:  # leaves are asked for one after another
                self._stores.clear()
            self._stores[stored] = open_array(self.directory / layout.STATE, stored)
        return np.asarray(self._stores[stored][index].read().result())

    def _merged(self, name: str, shape: tuple[int, ...], index: Index) -> np.ndarray:
        """A kernel with its LoRA adapter merged into it, as jpt.quant.dot.dense does."""
        repeats, rows, columns = index
        packing = self._packings.get(f'{name}/base')
        if packing is None:
            base = self._part(f'{name}/base', index)
        else:
            numbers = numbers_at(packing, shape, index, lambda part, where: self._part(f'{name}/base/{part}', where))
            base = numbers.astype(packing.weight_dtype)
        rank = slice(None)
        a, b = self._part(f'{name}/a', (repeats, rank, columns)), self._part(f'{name}/b', (repeats, rows, rank))
        scale = self._statics[f'{self._names[name + "/a"].removesuffix("/a")}/scale']
        return merged(base, a, b, scale)


def load_model(
    path: str | os.PathLike[str], dtype: DTypeLike | None = None, shardings: Any = None, *, check_files: bool = True
) -> tuple[ModelConfig, dict[str, Any], Path | None]:
    """Loads the model of a jpt checkpoint: (cfg, params, directory of the tokenizer or None).

    Args:
        path: a model, a step of a training run, or a run's workdir (its newest step).
        dtype, shardings: as `load_tree` and `StoredSource` take them.
        check_files: compare the files with their checksums first.

    Raises:
        FileNotFoundError, ValueError: as `StoredSource` and `load_tree`.
    """
    source = StoredSource(path, dtype, check_files=check_files)
    assets = source.assets
    tokenizer = assets if assets is not None and has_tokenizer(assets) else None
    return source.cfg, load_tree(source, shardings), tokenizer


def save_model(
    path: str | os.PathLike[str],
    cfg: ModelConfig,
    params: Any,
    assets: str | os.PathLike[str] | None = None,
    origin: str | os.PathLike[str] | None = None,
) -> None:
    """Saves parameters, sharded as they may be, as a jpt checkpoint; every process of a job calls this.

    Args:
        path: the directory to make; it appears when it is complete.
        cfg, params: the model.
        assets: a directory whose tokenizer files, generation_config.json and config.json travel along.
        origin: the directory of the model that the weights were read from, for its card; None: from none.

    Raises:
        FileExistsError: there is something at `path`.
        ValueError: the parameters are not those of `cfg`. Rows that pad the vocabulary for a mesh are left out.
    """
    import orbax.checkpoint as ocp

    from jpt.checkpoint.orbax_items import handler_registry, save_args

    target = check_absent(path).absolute()
    source = TreeSource(cfg, params)
    named = {PARAMS + name_of(leaf.path): source.array(leaf) for leaf in leaves_of(source)}
    directory, card = (None if given is None else Path(given) for given in (assets, origin))
    about = layout.About('model', specs_of(named), cfg, tokenizer_fingerprint(directory), _statics(source))
    if target.is_dir() and jax.process_index() == 0:
        target.rmdir()
    handler = ocp.CompositeCheckpointHandler(handler_registry=handler_registry())
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(target, args=save_args(about, named, assets=directory, origin=card))


def write_model(
    source: LeafSource,
    path: str | os.PathLike[str],
    *,
    assets: str | os.PathLike[str] | None = None,
    origin: str | os.PathLike[str] | None = None,
    report: Callable[[str, int], Any] = lambda name, size: None,
) -> None:
    """Writes a model as a jpt checkpoint with a block of one leaf in memory at a time; in a single process.

    Arguments and errors as `save_model`; `report` is called with the name and bytes of each block.
    """
    directory = None if assets is None else Path(assets)
    streamed, specs = {}, {}
    for leaf in leaves_of(source):
        name, dtype = PARAMS + name_of(leaf.path), source.dtype(leaf)
        # Scales follow the codes that they are of: a source may make them together.
        codes = None if leaf.part in (None, 'codes') else PARAMS + name_of((*leaf.weight_path, 'codes'))
        streamed[name] = Streamed(leaf.shape, dtype, _rows_of(source, leaf), codes)
        specs[name] = LeafSpec(str(dtype), leaf.shape)
    about = layout.About('model', specs, source.cfg, tokenizer_fingerprint(directory), _statics(source))
    items = [layout.STATE, layout.MODEL] + ([] if directory is None else [layout.ASSETS])
    with new_directory(path) as target:
        write_state(target, streamed, report)
        for item in (*items, layout.MANIFEST):
            (target / item).mkdir(exist_ok=True)
        (target / layout.MODEL / layout.MODEL_FILE).write_text(json.dumps(layout.to_json(about)), 'utf-8')
        if directory is not None:
            copy_companions(directory, None if origin is None else Path(origin), target / layout.ASSETS)
        write_manifest(target, target / layout.MANIFEST, items)


def _statics(source: LeafSource) -> dict[str, Any]:
    """The static fields of quantized weights, as `statics_of` finds them in a tree."""
    found: dict[str, Any] = {}
    for path, packing in source.quantized.items():
        name = PARAMS + name_of(path)
        found |= {f'{name}/format': dataclasses.asdict(packing.form), f'{name}/weight_dtype': packing.weight_dtype}
    return found


def _rows_of(source: LeafSource, leaf: Leaf) -> Callable[[slice], np.ndarray]:
    return lambda rows: source.read(leaf, (rows, *whole(leaf)[1:]))
