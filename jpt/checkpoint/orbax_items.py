"""The items of a jpt checkpoint as Orbax writes them: handlers, save arguments, and the restore of the state.

Importing this module imports Orbax (about a second); the readers of Hugging Face directories do without it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jpt.checkpoint import about as layout
from jpt.checkpoint.assets import copy_companions
from jpt.checkpoint.manifest import write_manifest
from jpt.checkpoint.tree import LeafSpec, from_storable, nest, parts_of, to_storable

# A chunk is read whole even where a device needs a part of it, and is encoded in one piece.
CHUNK_BYTES = 256 * 2**20
METRICS = 'metrics'  # Orbax's own name for the item and its file


class AssetsHandler(ocp.CheckpointHandler):
    """Copies the tokenizer and its companions into a checkpoint."""

    def save(self, directory: Any, args: 'AssetsSave') -> None:
        if jax.process_index() == 0:
            copy_companions(Path(args.source), args.origin, Path(directory))

    def restore(self, directory: Any, args: Any = None) -> Any:
        return Path(directory)


@ocp.args.register_with_handler(AssetsHandler, for_save=True, for_restore=True)
class AssetsSave(ocp.args.CheckpointArgs):
    def __init__(self, source: str | Path = '', origin: Path | None = None) -> None:
        self.source, self.origin = source, origin


class ManifestHandler(ocp.CheckpointHandler):
    """Writes the checksums of the other items when they are complete, before the checkpoint gets its name."""

    def save(self, directory: Any, args: 'ManifestSave') -> None:
        self._items = args.items

    def restore(self, directory: Any, args: Any = None) -> Any:
        return Path(directory)

    def finalize(self, directory: Any) -> None:
        """Runs on one process, after the other items' finalization: they are registered before this one."""
        step = Path(directory).parent
        unfinished = [item for item in self._items if not (step / item).is_dir()]
        if unfinished:
            raise RuntimeError(f'{step}: the manifest would miss {unfinished}: Orbax has changed its order of items')
        write_manifest(step, Path(directory), self._items)


@ocp.args.register_with_handler(ManifestHandler, for_save=True, for_restore=True)
class ManifestSave(ocp.args.CheckpointArgs):
    def __init__(self, items: tuple[str, ...] = ()) -> None:
        self.items = items


def state_handler() -> Any:
    """The handler of the state: OCDBT and zarr3, uncompressed: weights hardly shrink, and saving gets much slower."""
    return ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)


def handler_registry() -> Any:
    """Handlers of all items, the manifest last, since Orbax finalizes items in this order."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add(layout.STATE, ocp.args.PyTreeSave, state_handler())
    for item, file in (
        (layout.MODEL, layout.MODEL_FILE),
        (layout.CONFIG, layout.CONFIG_FILE),
        (layout.DATA, layout.DATA_FILE),
    ):
        registry.add(item, ocp.args.JsonSave, ocp.JsonCheckpointHandler(file))
    registry.add(METRICS, ocp.args.JsonSave, ocp.JsonCheckpointHandler(METRICS))
    registry.add(layout.ASSETS, AssetsSave, AssetsHandler())
    registry.add(layout.MANIFEST, ManifestSave, ManifestHandler())
    return registry


def save_args(
    about: layout.About,
    leaves: Mapping[str, Any],
    *,
    assets: str | Path | None = None,
    origin: Path | None = None,
    config: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    with_metrics: bool = False,
) -> Any:
    """The Composite that saves leaves and everything that describes them; Orbax adds the metrics where it has some."""
    storable = {name: to_storable(leaf) for name, leaf in leaves.items()}
    chunks = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in storable}
    items: dict[str, Any] = {
        layout.STATE: ocp.args.PyTreeSave(nest(storable), save_args=nest(chunks)),
        layout.MODEL: ocp.args.JsonSave(layout.to_json(about)),
    }
    if config is not None:
        items[layout.CONFIG] = ocp.args.JsonSave(dict(config))
    if data is not None:
        items[layout.DATA] = ocp.args.JsonSave(dict(data))
    if assets is not None:
        items[layout.ASSETS] = AssetsSave(assets, origin)
    items[layout.MANIFEST] = ManifestSave((*items, METRICS) if with_metrics else tuple(items))
    return ocp.args.Composite(**items)


def restore_leaves(directory: Path, stored: Mapping[str, LeafSpec], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Reads leaves of the state in `directory`/state, each as its abstract leaf in `wanted` says.

    A leaf with a sharding becomes a jax.Array placed so; a number stays a number; anything else becomes numpy.
    Shapes and dtypes must have been compared before (`tree.differences`); nothing is cast here.
    """
    args = {name: _restore_arg(name, stored[name], leaf) for name, leaf in wanted.items()}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True)) as checkpointer:
        tree = checkpointer.restore(
            directory / layout.STATE,
            args=ocp.args.PyTreeRestore(
                item=nest(dict.fromkeys(args, 0)), restore_args=nest(args), partial_restore=True
            ),
        )
    return {name: from_storable(_lookup(tree, name), stored[name]) for name in wanted}


def _restore_arg(name: str, spec: LeafSpec, leaf: Any) -> Any:
    dtype = None if spec.dtype.startswith(('key<', 'python ')) else jax.numpy.dtype(spec.dtype)
    sharding = getattr(leaf, 'sharding', None)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
    if dtype is not None and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f'{name}: {spec} cannot be a jax.Array unless jax_enable_x64 is set; it is not cast silently')
    return ocp.ArrayRestoreArgs(sharding=sharding, dtype=dtype, restore_type=jax.Array)


def _lookup(tree: Any, name: str) -> Any:
    for part in parts_of(name):
        tree = tree[part]
    return tree
