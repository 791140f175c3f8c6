"""Opening a model by its path, whichever kind of directory it is."""

import os
from pathlib import Path
from typing import NamedTuple

from jax.typing import DTypeLike

from jpt.checkpoint.adapted import AdaptedSource, is_adapter, named_base
from jpt.checkpoint.assets import CONFIG_FILE, open_tokenizer
from jpt.checkpoint.dequantized import DequantizedSource
from jpt.checkpoint.hf_import import HuggingFaceSource, is_hf_directory
from jpt.checkpoint.model_dir import StoredSource, find_checkpoint
from jpt.checkpoint.source import LeafSource, WithoutMTP, WithPlainCache

SHIPPED = {'quickstart': Path(__file__).resolve().parents[1] / 'assets' / 'quickstart_teacher'}


class Opened(NamedTuple):
    """A model's weights, and the directories of its tokenizer and companions and of its card (None: there are none)."""

    source: LeafSource
    assets: Path | None
    origin: Path | None


def model_directory(path: str | os.PathLike[str]) -> Path:
    """The directory that a user means: a path, or the name of a model that jpt ships."""
    return SHIPPED.get(str(path), Path(path))


def base_model(adapter: Path) -> Path:
    """The directory of the model that a PEFT adapter belongs to.

    A relative name is first seen from the adapter, then from the current directory, and last is that of a model that
    jpt ships: an adapter that travels with its base finds it wherever they are opened.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is an adapter itself.
    """
    name = named_base(adapter)
    for directory in (adapter / name, Path(name), SHIPPED.get(name)):
        if directory is not None and directory.is_dir():
            if is_adapter(directory):
                raise ValueError(f'{adapter} is a PEFT adapter of {directory}, which is an adapter too')
            return directory
    raise FileNotFoundError(
        f'{adapter} is a PEFT adapter of {name!r}, which is no directory here: fetch that model and put its path into '
        'base_model_name_or_path of adapter_config.json'
    )


def open_model(
    path: str | os.PathLike[str],
    dtype: DTypeLike | None = None,
    *,
    mtp: bool = True,
    codes: bool = False,
    ignore_kv_scales: bool = False,
) -> Opened:
    """Opens a Hugging Face directory or a jpt checkpoint (a model, a step of a run, or a run's workdir).

    A PEFT adapter is merged into the model that it names as its base, which must be a directory too. Where a tokenizer
    lies beside the adapter it is taken in place of the base's, since the adapter was trained with it. `mtp=False`
    leaves out the modules that predict further tokens. Quantized weights stay so, unless a dtype is asked for: then
    they are numbers of that dtype, or with `codes` stay so all the same, and the dtype is that of all other weights.
    `ignore_kv_scales` opens a model whose keys and values are kept in eight bits as one that keeps them as computed; a
    dtype does not, since it is that of weights.

    Raises:
        FileNotFoundError: none of these.
        ValueError: what is there is not a model that jpt computes; see the sources.
    """
    directory = model_directory(path)
    if not directory.is_dir():
        raise FileNotFoundError(f'{directory}: no such directory')
    if is_adapter(directory):
        base = open_model(base_model(directory), dtype, mtp=mtp, ignore_kv_scales=ignore_kv_scales)
        assets = base.assets if open_tokenizer(directory) is None else directory
        return Opened(AdaptedSource(base.source, directory), assets, base.origin)
    if (directory / CONFIG_FILE).is_file() or is_hf_directory(directory):
        read = HuggingFaceSource(directory, dtype, mtp=mtp, ignore_kv_scales=ignore_kv_scales)
        return Opened(_in_dtype(read, None if codes else dtype), directory, directory)
    try:
        find_checkpoint(directory)
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{error}; and not a Hugging Face directory: it has no {CONFIG_FILE}') from error
    stored = StoredSource(directory, dtype)
    found = _in_dtype(WithPlainCache(stored) if ignore_kv_scales else stored, None if codes else dtype)
    return Opened(found if mtp else WithoutMTP(found), stored.assets, stored.assets)


def _in_dtype(source: LeafSource, dtype: DTypeLike | None) -> LeafSource:
    """The source, and where a dtype is asked for, with that in place of quantized weights."""
    return DequantizedSource(source, dtype) if source.quantized and dtype is not None else source
