"""The files that travel with weights: tokenizer, generation_config.json, config.json and card of the source."""

import os
import shutil
from pathlib import Path

from jpt.data.tokenizer import TOKENIZER_FILES, Tokenizer

GENERATION_FILE, CONFIG_FILE, CARD_FILE = 'generation_config.json', 'config.json', 'README.md'
COMPANIONS = (GENERATION_FILE, CONFIG_FILE)


def copy_assets(source: Path, target: Path, names: tuple[str, ...] = TOKENIZER_FILES + COMPANIONS) -> list[str]:
    """Copies what `source` holds of the named files into `target`, byte for byte; returns their names."""
    target.mkdir(parents=True, exist_ok=True)
    found = [name for name in names if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found


def copy_companions(assets: Path, origin: Path | None, target: Path) -> None:
    """Copies tokenizer and companions of `assets`; a card only from `origin`, the model that the weights came from."""
    copy_assets(assets, target)
    if origin is not None:
        copy_assets(origin, target, (CARD_FILE,))


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds any file of a tokenizer."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def open_tokenizer(directory: str | os.PathLike[str] | None) -> Tokenizer | None:
    """The tokenizer in a directory; None where there is none that jpt reads, as with a lone SentencePiece model."""
    if directory is None or not has_tokenizer(Path(directory)):
        return None
    try:
        return Tokenizer.load(Path(directory))
    except FileNotFoundError:
        return None


def tokenizer_fingerprint(directory: str | os.PathLike[str] | None) -> str | None:
    """The fingerprint of the tokenizer in a directory; None where there is none that jpt reads."""
    tokenizer = open_tokenizer(directory)
    return None if tokenizer is None else tokenizer.fingerprint()
