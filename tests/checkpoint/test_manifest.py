"""Checksums: known values, and every way in which a file can differ from what was saved."""

import json
import zlib
from pathlib import Path

import pytest

from jpt.checkpoint.manifest import (
    MANIFEST_FILE,
    CheckpointMismatch,
    DamagedCheckpoint,
    file_checksum,
    verify,
    write_manifest,
)


def make(directory: Path) -> Path:
    """A checkpoint of two items; the path of its manifest."""
    for name, content in {
        'state/d/a': b'123456789',
        'state/m': b'',
        'model/model.json': b'{}',
        'other/x': b'x',
    }.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (directory / 'manifest').mkdir()
    write_manifest(directory, directory / 'manifest', ['state', 'model'])
    return directory / 'manifest' / MANIFEST_FILE


def test_the_checksum_is_crc_32(tmp_path: Path) -> None:
    (tmp_path / 'a').write_bytes(b'123456789')
    assert file_checksum(tmp_path / 'a') == 'cbf43926'  # the check value of CRC-32/ISO-HDLC


def test_the_manifest_lists_every_file_of_its_items(tmp_path: Path) -> None:
    content = json.loads(make(tmp_path).read_text())
    assert content['files'] == {
        'model/model.json': {'bytes': 2, 'crc32': 'a3a6bf43'},
        'state/d/a': {'bytes': 9, 'crc32': 'cbf43926'},
        'state/m': {'bytes': 0, 'crc32': '00000000'},
    }


def test_an_untouched_checkpoint_passes(tmp_path: Path) -> None:
    verify(tmp_path, make(tmp_path))


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[4] ^= 0x10
    path.write_bytes(bytes(raw))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (flip_a_bit, 'state/d/a: checksum .*, expected cbf43926'),
        (truncate, 'state/d/a: 8 bytes, expected 9'),
        (Path.unlink, 'state/d/a: missing'),
    ],
)
def test_damage_names_the_file(tmp_path: Path, damage, message: str) -> None:
    manifest = make(tmp_path)
    damage(tmp_path / 'state' / 'd' / 'a')
    with pytest.raises(DamagedCheckpoint, match=message):
        verify(tmp_path, manifest)


def test_all_damaged_files_are_named_at_once(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    (tmp_path / 'state' / 'd' / 'a').unlink()
    (tmp_path / 'model' / 'model.json').write_text('[]')
    with pytest.raises(DamagedCheckpoint, match=r'(?s)model/model\.json: checksum.*state/d/a: missing'):
        verify(tmp_path, manifest)


def test_processes_share_the_files(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    (tmp_path / 'state' / 'd' / 'a').unlink()
    found = []
    for process in range(3):
        try:
            verify(tmp_path, manifest, (process, 3))
        except DamagedCheckpoint:
            found.append(process)
    assert len(found) == 1


@pytest.mark.parametrize(('text', 'message'), [(None, 'no finished jpt checkpoint'), ('{', 'not a manifest')])
def test_a_missing_or_broken_manifest_is_damage(tmp_path: Path, text: str | None, message: str) -> None:
    manifest = make(tmp_path)
    manifest.unlink()
    if text is not None:
        manifest.write_text(text)
    with pytest.raises(DamagedCheckpoint, match=message):
        verify(tmp_path, manifest)


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    raw = manifest.read_bytes()
    for place, byte in enumerate(raw):
        manifest.write_bytes(raw[:place] + bytes([byte ^ 1 << place % 8]) + raw[place + 1 :])
        with pytest.raises(DamagedCheckpoint, match=r'manifest\.json: (checksum|not a manifest)'):
            verify(tmp_path, manifest)
    for length in range(len(raw)):
        manifest.write_bytes(raw[:length])
        with pytest.raises(DamagedCheckpoint, match='not a manifest'):
            verify(tmp_path, manifest)


def test_a_manifest_of_an_older_format_is_no_damage(tmp_path: Path) -> None:
    """Damage would have the checkpoint set aside."""
    manifest = make(tmp_path)
    manifest.write_text(json.dumps({'files': json.loads(manifest.read_text())['files']}))
    with pytest.raises(CheckpointMismatch, match=r"no checksum 'crc32' of the list: written in an older format"):
        verify(tmp_path, manifest)
    files = {'model/model.json': {'size': 2}}
    text = json.dumps(files, sort_keys=True).encode()
    manifest.write_text(json.dumps({'files': files, 'crc32': f'{zlib.crc32(text):08x}'}))
    with pytest.raises(CheckpointMismatch, match='expected bytes and crc32 of each file'):
        verify(tmp_path, manifest)
