"""The text that every Python installation carries: its own standard library, as a corpus with nothing to download.

Which files are read, and which of them are held out, is fixed by the lists beside this file: names and SHA-256 per
minor version of Python (written by jpt/data/stdlib_lists.py). The held-out names are the same in every list.
"""

import hashlib
import json
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

LISTS = Path(__file__).parent / 'stdlib'
SPLITS = ('train', 'held_out')


class StdlibCorpus(NamedTuple):
    """The documents of one split in the order of the list, which is by name."""

    split: str
    made_from: str  # the Python release whose hashes the list holds
    names: tuple[str, ...]  # relative to the standard library, with '/'
    texts: tuple[str, ...]  # whole files, with '\n' line ends
    changed: tuple[str, ...]  # the names whose content is not the listed one: another patch release, or a distributor's

    def describe(self) -> str:
        """One line for a run's plan: files, bytes, and how many differ from the list."""
        size = sum(len(text.encode()) for text in self.texts)
        line = f'stdlib {self.split}: {len(self.names)} files, {size / 1e6:.2f} MB'
        if not self.changed:
            return f'{line}, all as in Python {self.made_from}'
        return f'{line}, {len(self.changed)} of them differ from Python {self.made_from}, the first {self.changed[0]}'


def normalize(raw: bytes) -> bytes:
    """The file's bytes with Unix line ends, so that the hash of a file is the same on every platform."""
    return raw.replace(b'\r\n', b'\n')


def file_hash(raw: bytes) -> str:
    """Hexadecimal SHA-256 of the file's bytes after normalize."""
    return hashlib.sha256(normalize(raw)).hexdigest()


def stdlib_root() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()['stdlib'])


def read_list(split: str, version: str = '') -> tuple[str, dict[str, str]]:
    """The fixed list of one split: the release that it was made from, and {name: SHA-256} in order.

    split: 'train' or 'held_out'. version: '3.11' or '3.12'; default the running interpreter's.
    Raises ValueError for an unknown split, or a version that has no list.
    """
    if split not in SPLITS:
        raise ValueError(f'stdlib split={split!r}: expected one of {", ".join(SPLITS)}')
    version = version or f'{sys.version_info.major}.{sys.version_info.minor}'
    path = LISTS / f'py{version.replace(".", "")}.json'
    if not path.is_file():
        have = ', '.join(sorted(found.stem for found in LISTS.glob('py*.json')))
        raise ValueError(f'stdlib corpus: no list for Python {version} in {LISTS}; there are {have}')
    content = json.loads(path.read_text())
    return content['made_from'], content[split]


def read_stdlib(split: str, *, root: Path | None = None, version: str = '', exact: bool = False) -> StdlibCorpus:
    """Reads every file of a split.

    A file that differs from its listed hash is used and named in `changed`: patch releases and distributors edit a few
    files, and the split depends on names alone. A file that is missing would change which text is trained on, so it is
    an error, as is an undecodable one.

    split: 'train' or 'held_out'. root: folder of the standard library; default the running interpreter's.
    version: which list; default the running interpreter's. exact: a changed file is an error too.
    Raises FileNotFoundError naming every missing file, ValueError naming changed (exact) or undecodable ones.
    """
    root = stdlib_root() if root is None else root
    made_from, wanted = read_list(split, version)
    missing = [name for name in wanted if not (root / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f'stdlib {split}: {len(missing)} of {len(wanted)} files are not in {root}: {", ".join(missing)}. '
            'Some distributors split the standard library into packages; install the rest of it (Debian and Ubuntu: '
            'libpython3-stdlib), or use an interpreter from python.org, docker, uv or conda.'
        )
    raws = {name: (root / name).read_bytes() for name in wanted}
    changed = tuple(name for name, digest in wanted.items() if file_hash(raws[name]) != digest)
    if exact and changed:
        raise ValueError(
            f'stdlib {split}: {len(changed)} files under {root} differ from Python {made_from}: {", ".join(changed)}'
        )
    texts = tuple(_decode(raw, root / name) for name, raw in raws.items())
    return StdlibCorpus(split, made_from, tuple(wanted), texts, changed)


def load_stdlib(split: str) -> list[str]:
    """The documents of 'train' or 'held_out' for the running interpreter; what a data pipeline reads."""
    return list(read_stdlib(split).texts)


def _decode(raw: bytes, path: Path) -> str:
    try:
        return normalize(raw).decode('utf-8')
    except UnicodeDecodeError as error:
        raise ValueError(f'stdlib corpus: {path} is not UTF-8: {error}') from error
