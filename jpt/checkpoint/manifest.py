"""Checksums of a checkpoint's files, written before it is committed and compared before it is restored.

CRC-32 and size of every file, and a CRC-32 of this list: it finds truncation, flipped bits and exchanged files. It is
no signature, since whoever can write the files can write the manifest too. Cost: one reading of the files at about 1.5
GB/s per core, after saving in the background thread, and before restoring.
"""

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST_FILE = 'manifest.json'
_BLOCK = 1 << 22
_THREADS = 8


class DamagedCheckpoint(ValueError):  # noqa: N818 (what it is, as a user would say it)
    """Files of a checkpoint are missing, or are not what was saved."""


class CheckpointMismatch(ValueError):  # noqa: N818 (what it is, as a user would say it)
    """A checkpoint holds other leaves, shapes, dtypes, another model or tokenizer than what it is to be restored to,
    or is written in an older form than this version reads."""


def file_checksum(path: Path) -> str:
    """CRC-32 of a file, as eight hexadecimal digits."""
    crc = 0
    with path.open('rb') as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return f'{crc:08x}'


def checksums(directory: Path, items: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and CRC-32 of every file under the given items of a checkpoint, by path relative to it."""
    files = [path for item in items for path in sorted((directory / item).rglob('*')) if path.is_file()]
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = list(pool.map(file_checksum, files))
    return {
        path.relative_to(directory).as_posix(): {'bytes': path.stat().st_size, 'crc32': crc}
        for path, crc in zip(files, sums, strict=True)
    }


def write_manifest(directory: Path, target: Path, items: Iterable[str]) -> None:
    """Writes the checksums of `items` of the checkpoint `directory` as a manifest in the directory `target`."""
    files = checksums(directory, items)
    content = json.dumps({'files': files, 'crc32': _checksum_of(files)}, indent=1, sort_keys=True)
    temporary = target / f'.{MANIFEST_FILE}.incomplete'
    temporary.write_text(content, 'utf-8')
    os.replace(temporary, target / MANIFEST_FILE)


def _checksum_of(files: Mapping[str, Any]) -> str:
    """CRC-32 of the list of files itself, however it is laid out as text."""
    return f'{zlib.crc32(json.dumps(files, sort_keys=True).encode()):08x}'


def verify(directory: Path, manifest: Path, share: tuple[int, int] = (0, 1)) -> None:
    """Compares the files of a checkpoint with its manifest.

    Args:
        directory: the checkpoint.
        manifest: the manifest's file.
        share: (i, n): read every n-th file from the i-th on, so that n processes together read each file once.

    Raises:
        DamagedCheckpoint: names every file that is missing, has another size, or other content.
        CheckpointMismatch: the manifest is whole, but of a format that this version does not read.
    """
    try:
        content = json.loads(manifest.read_text('utf-8'))
        files = content['files']
        older = content.keys() == {'files'}  # whole, and without what was added later
        recorded = None if older else content['crc32']
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f'{directory}: {manifest.name} is missing; it is no finished jpt checkpoint') from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f'{manifest}: not a manifest ({error!r})') from error
    if older:
        raise CheckpointMismatch(f"{manifest}: no checksum 'crc32' of the list: written in an older format")
    if (found := _checksum_of(files)) != recorded:
        raise DamagedCheckpoint(f'{manifest}: checksum {found}, expected {recorded}')
    if any(not {'bytes', 'crc32'} <= set(entry) for entry in files.values()):
        raise CheckpointMismatch(f'{manifest}: expected bytes and crc32 of each file: written in another format')
    mine = [item for number, item in enumerate(sorted(files.items())) if number % share[1] == share[0]]
    with ThreadPoolExecutor(_THREADS) as pool:
        faults = [fault for fault in pool.map(lambda item: _fault(directory / item[0], *item), mine) if fault]
    if faults:
        raise DamagedCheckpoint(f'{directory}: damaged:\n  ' + '\n  '.join(faults[:20]))


def _fault(path: Path, name: str, recorded: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return f'{name}: missing'
    size = path.stat().st_size
    if size != recorded['bytes']:
        return f'{name}: {size} bytes, expected {recorded["bytes"]}'
    crc = file_checksum(path)
    return None if crc == recorded['crc32'] else f'{name}: checksum {crc}, expected {recorded["crc32"]}'
