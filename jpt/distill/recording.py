"""Recording a data set: windows of documents, the teacher's words of each piece, and parts of a folder that hold them.

A window gives one part, and windows do not depend on the batch or the mesh: a run that is stopped goes on behind the
last part that is there, and the folder is the same in the end.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jpt.checkpoint.fingerprint import fingerprint_of
from jpt.checkpoint.source import to_host
from jpt.data.batch import pack_rows
from jpt.data.config import DataConfig
from jpt.data.packing import Piece as Span
from jpt.data.packing import Row
from jpt.data.sources import open_source
from jpt.data.target_codec import ROUNDINGS, PieceTargets, decode_targets, encode_targets
from jpt.data.target_store import (
    Manifest,
    Part,
    Piece,
    hash_of,
    part_path,
    read_manifest,
    read_parts,
    write_manifest,
    write_part,
)
from jpt.data.tokenizer import Tokenizer
from jpt.data.windows import Window, WindowReader
from jpt.distill.teacher import TeacherProgram, make_teacher
from jpt.kernels.likely_words import Likely
from jpt.kernels.sparse_target import SparseTarget
from jpt.training.job import make_job
from jpt.training.run import check_models, check_teachers, say
from jpt.training.settings import TrainConfig, teacher_alone
from jpt.training.tokenizers import open_assets


def record(config: TrainConfig, output: Path) -> Manifest:
    """Records the data of a distillation, or what of it is not in `output` yet, and returns the manifest.

    Raises:
        ValueError: settings that do not hold, or `output` holds what was recorded with others.
    """
    tokenizer, _ = open_assets(config)
    job = make_job(teacher_alone(config, config.mesh, config.batch.microbatches))
    check_models(job, tokenizer, alone='teacher')
    check_teachers(config, tokenizer)
    teacher = make_teacher(config, job)
    splits = {'train': config.data} | ({} if config.eval.data is None else {'eval': config.eval.data})
    readers = {name: reader_of(data, tokenizer, config.batch.length) for name, data in splits.items()}
    manifest = manifest_of(config, teacher, tokenizer, readers)
    say(describe(config, teacher, manifest))
    known = begin(output, manifest)
    if known.parts is not None:
        say(f'{output} is complete already')
        return known
    parts = {name: record_split(teacher, reader, output, name, config) for name, reader in readers.items()}
    _all_here('all written')
    done = dataclasses.replace(manifest, parts={name: summary(found) for name, found in parts.items()})
    if jax.process_index() == 0:
        write_manifest(output, done)
    say(result(output, done))
    return done


def reader_of(data: DataConfig, tokenizer: Tokenizer, length: int) -> WindowReader:
    """Windows of every document once, in the order of the files, each cut only where it is longer than a row."""
    sources = [open_source(path, data.fields, data.is_chat, data.separator) for path in data.paths]
    whole = dataclasses.replace(data, packing='best_fit', least_fill=0.0, weights=())
    return WindowReader(whole, tokenizer, sources, seq_len=length, seed=0, evaluate=True)


def manifest_of(
    config: TrainConfig, teacher: TeacherProgram, tokenizer: Tokenizer, readers: dict[str, WindowReader]
) -> Manifest:
    """What is to be recorded, without its parts."""
    model, kept = teacher.job.models['model'], config.record
    assert model.source is not None
    assert config.teacher is not None
    return Manifest(
        teacher={
            'path': config.teacher.path,
            'family': model.cfg.family,
            'fingerprint': fingerprint_of(model.source),
            'dtype': teacher.job.config.compute.dtype,
        },
        tokenizer=tokenizer.fingerprint(),
        vocab_size=teacher.vocab_size,
        temperature=config.distill.temperature,
        likely=kept.likely,
        top_p=kept.top_p,
        at_least=kept.at_least,
        dtype=kept.dtype,
        relative_error=ROUNDINGS[kept.dtype].relative_error,
        length=config.batch.length,
        data={name: json.loads(json.dumps(reader.fingerprint())) for name, reader in readers.items()},
    )


def begin(output: Path, manifest: Manifest) -> Manifest:
    """The manifest in `output`, written now where there is none; all processes see the same when this returns.

    Raises:
        ValueError: there is one, of other settings or other data.
    """
    found = read_manifest(output)
    _all_here('manifest read')
    if found is None:
        if jax.process_index() == 0:
            output.mkdir(parents=True, exist_ok=True)
            write_manifest(output, manifest)
        return manifest
    old, new = (dataclasses.asdict(dataclasses.replace(each, parts=None)) for each in (found, manifest))
    if differs := first_difference(old, new):
        name, *values = differs
        raise ValueError(
            f'{output} holds what was recorded with {name}={values[0]!r}, and here it is {values[1]!r}: expected the '
            'same settings and data, or another --output'
        )
    return found


def first_difference(old: Any, new: Any, name: str = '') -> tuple[str, Any, Any] | None:
    """Where two values of JSON differ, by the names that lead there, and both values; None where they are equal."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return None if old == new else (name, old, new)
    inside = (first_difference(old.get(k), new.get(k), f'{name}.{k}'.lstrip('.')) for k in {**old, **new})
    return next((found for found in inside if found), None)


def record_split(
    teacher: TeacherProgram, reader: WindowReader, output: Path, split: str, config: TrainConfig
) -> list[Part]:
    """All parts of a split: those that are there, and what is missing behind them."""
    parts = read_parts(output, split)
    _all_here(f'{split} read')  # before the first process writes the next one
    place: dict[str, Any] = parts[-1].about['next'] if parts else {'position': 0, 'taken': [0] * len(reader.sources)}
    if parts:
        say(f'{split}: {len(parts)} parts are there, {place["position"]:,} of {reader.order.epoch_length:,} documents')
    while place['position'] < reader.order.epoch_length:
        start = time.monotonic()
        window = reader.read(place['position'], place['taken'])
        pieces, sums = record_window(teacher, reader, window, config)
        place = {'position': window.end, 'taken': list(window.taken)}
        path = part_path(output, split, len(parts))
        about = {'next': place, 'sums': sums | {name: count for name, count in window.counts.items() if count}}
        if jax.process_index() == 0:
            write_part(path, pieces, about)
        parts.append(Part(path, np.zeros(0), about))
        speed = sums['tokens'] / (time.monotonic() - start)
        say(f'{split}: {place["position"]:,} of {reader.order.epoch_length:,} documents, {speed:,.0f} tokens/s')
    return parts


def record_window(
    teacher: TeacherProgram, reader: WindowReader, window: Window, config: TrainConfig
) -> tuple[list[Piece], dict[str, float]]:
    """The pieces of a window in the order of its documents, and what is counted of them.

    Raises:
        FloatingPointError: the teacher gives numbers that are not finite, by the name of the document.
    """
    sums: dict[str, float] = {'tokens': 0}
    pieces: list[tuple[Span, Piece]] = []
    hashes: dict[int, bytes] = {}
    for span, said in targets_of(teacher, reader, window, config):
        ids, (source, place) = window.documents[span.document].ids, window.places[span.document]
        if not np.isfinite(said.sampled_logp).all() or np.isnan(said.target.logp).any():
            where = reader.sources[source].place(place)
            raise FloatingPointError(f'{where}: the teacher gives log-probabilities that are not finite')
        data = encode_targets(said, config.record.dtype, teacher.vocab_size)
        own = hash_of(ids[span.start : span.start + span.length + 1])
        if span.document not in hashes:
            hashes[span.document] = hash_of(ids)
        pieces.append((span, Piece(hashes[span.document], own, span.start, span.length, 0, source, place, data)))
        counts = {
            'documents': int(span.start == 0),
            'tokens': span.length,
            'words': int((said.target.ids >= 0).sum()),
            'tail': float(np.exp(said.target.log_tail.astype(np.float64)).sum()),
            'nats': -float(said.sampled_logp.sum(dtype=np.float64)),
        }
        if len(pieces) == 1:  # of one piece in a part the error of rounding is measured
            counts |= rounding(said, decode_targets(data, config.record.dtype))
        sums = added(sums, counts)
    return [piece for _, piece in sorted(pieces, key=lambda pair: pair[0])], sums


def added(sums: dict[str, float], more: dict[str, float]) -> dict[str, float]:
    """Sums by name, of both."""
    return sums | {name: sums.get(name, 0) + value for name, value in more.items()}


def rounding(given: PieceTargets, kept: PieceTargets) -> dict[str, float]:
    """How far log-probabilities moved, weighed by the words' probabilities: a sum over positions, and their number."""
    used = given.target.ids >= 0
    logp = np.where(used, given.target.logp, 0).astype(np.float64)
    moved = np.where(used, np.exp(logp) * np.abs(np.where(used, kept.target.logp, 0).astype(np.float64) - logp), 0)
    return {'rounding': float(moved.sum()), 'rounding_tokens': len(logp)}


def targets_of(
    teacher: TeacherProgram, reader: WindowReader, window: Window, config: TrainConfig
) -> Iterator[tuple[Span, PieceTargets]]:
    """Of every piece of a window what the teacher says; the next batch is computed while one is taken apart."""
    size, length = config.batch.size, config.batch.length
    waiting: tuple[list[Row], Likely] | None = None
    for first in [*range(0, len(window.rows), size), None]:
        now = None
        if first is not None:
            rows = window.rows[first : first + size]
            spans = [[(window.documents[p.document], slice(p.start, p.start + p.length + 1)) for p in r] for r in rows]
            texts = [[(document.ids[span], document.loss[span]) for document, span in row] for row in spans]
            now = rows, teacher(pack_rows(texts, length, reader.tokenizer.pad_id or 0, size))
        if waiting is not None:
            yield from apart(*waiting)
        waiting = now


def apart(rows: list[Row], said: Likely) -> Iterator[tuple[Span, PieceTargets]]:
    """The pieces of packed rows from what was said of the rows [B, T, ...]."""
    (ids, logp, log_tail), sampled = jax.tree.map(to_host, said)
    for b, row in enumerate(rows):
        at = 0
        for span in row:
            own = (b, slice(at, at + span.length))
            yield span, PieceTargets(SparseTarget(ids[own], logp[own], log_tail[own]), sampled[own])
            at += span.length


def summary(parts: list[Part]) -> dict[str, Any]:
    """The files of a split and what was counted of it, for the manifest."""
    sums: dict[str, float] = {}
    for part in parts:
        sums = added(sums, part.about['sums'])
    files = [{'file': part.path.name, 'bytes': part.path.stat().st_size} for part in parts]
    return {'parts': files, 'sums': sums}


def describe(config: TrainConfig, teacher: TeacherProgram, manifest: Manifest) -> str:
    """What is about to be recorded, in a few lines, and whether rows of training would be cut elsewhere."""
    mesh = teacher.job.mesh
    axes = ', '.join(f'{axis}={size}' for axis, size in mesh.shape.items() if size > 1) or 'one device'
    notes = []
    if config.data.packing == 'concat' or config.data.cut_until > 0:
        notes = [
            f'note     config.data.packing={config.data.packing}, least_fill={config.data.least_fill} cuts documents '
            'elsewhere than this does: train with best_fit and least_fill=0, see docs/record.md'
        ]
    return '\n'.join(
        [
            *notes,
            f'teacher  {manifest.teacher["path"]}, {manifest.teacher["family"]}, {manifest.teacher["dtype"]}',
            f'keeps    {manifest.words()} of {manifest.vocab_size:,}, {manifest.dtype}, at temperature '
            f'{manifest.temperature:g}',
            f'data     {", ".join(config.data.paths)}; held out: '
            f'{", ".join(config.eval.data.paths) if config.eval.data else "none"}',
            f'mesh     {axes}; {config.batch.size} x {config.batch.length} tokens at a time',
        ]
    )


def result(output: Path, manifest: Manifest) -> str:
    """What was recorded."""
    lines = []
    for name, split in (manifest.parts or {}).items():
        sums, size = split['sums'], sum(part['bytes'] for part in split['parts'])
        tokens = max(sums.get('tokens', 0), 1)
        lines.append(
            f'{name}: {sums.get("documents", 0):,} documents, {tokens:,} tokens, {size / 2**20:,.1f} MiB, '
            f'{size / tokens:.0f} bytes per token; the words hold {1 - sums.get("tail", 0) / tokens:.2%} of the mass; '
            f'the teacher has {sums.get("nats", 0) / tokens:.4f} nats per token at this temperature'
        )
    return '\n'.join([*lines, f'saved    {output}'])


def _all_here(what: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)
