"""python -m jpt.convert --input=DIR --output=DIR --to=hf|jpt: a Hugging Face directory to a jpt checkpoint, and back.

Weights stream from files to files a part of a tensor at a time, so a model larger than memory is converted too. The
values are those that are stored, bit for bit, unless --dtype or --resize_vocab asks for others.
"""

import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app, flags, logging

from jpt.checkpoint.assets import open_tokenizer
from jpt.checkpoint.directories import check_absent
from jpt.checkpoint.dtypes import CAST_TARGETS
from jpt.checkpoint.hf_export import write_hf
from jpt.checkpoint.hf_quantized import LAYOUTS
from jpt.checkpoint.model_dir import write_model
from jpt.checkpoint.opening import Opened, open_model
from jpt.checkpoint.resize import ResizedSource
from jpt.checkpoint.selected import SelectedLayers
from jpt.checkpoint.shards import parse_size
from jpt.checkpoint.source import LeafSource, leaves_of
from jpt.models.names import Leaf, leaves

FORMATS = ('hf', 'jpt')


class Conversion(NamedTuple):
    """What was converted, for the table at the end."""

    family: str
    parameters: int
    bytes: int
    dtypes: str
    vocabulary: int
    files: int
    largest_file: int
    seconds: float


def convert(
    input_dir: str | Path,
    output_dir: str | Path,
    to: str,
    *,
    dtype: str | None = None,
    max_shard_size: str | int = '5GB',
    resize_vocab: int | None = None,
    allow_cut: bool = False,
    mtp: bool = True,
    layers: Sequence[int] | None = None,
    layout: str | None = None,
    ignore_kv_scales: bool = False,
    report: Callable[[str, int, int], Any] = lambda name, done, total: None,
) -> Conversion:
    """Converts a model directory; the output appears when it is complete.

    Args:
        input_dir: a Hugging Face directory, a jpt checkpoint, or the workdir of a training run (its newest step).
        output_dir: does not exist, or is empty.
        to: 'hf' or 'jpt'.
        dtype: cast floating-point weights to this; None keeps what is stored.
        max_shard_size: of the safetensors files, such as '5GB'.
        resize_vocab: rows of the embedding and unembedding wanted.
        allow_cut: with resize_vocab, let rows go that the tokenizer uses.
        mtp: keep modules that predict further tokens.
        layers: numbers of the layers that stay, ascending; None keeps all.
        layout: of quantized weights in a Hugging Face directory, see jpt/checkpoint/hf_quantized.py; None: the first
            that holds their formats.
        ignore_kv_scales: leave out that keys and values are kept in eight bits, where the input says so.
        report: called with a tensor's name, bytes written so far, and bytes in all.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: with what is wrong, and where.
    """
    if to not in FORMATS:
        raise ValueError(f'--to={to!r}: expected hf or jpt')
    if layout is not None and to != 'hf':
        raise ValueError(f'--layout={layout} with --to={to}: expected --to=hf')
    parse_size(max_shard_size)
    check_absent(output_dir)
    start = time.perf_counter()
    opened = open_model(input_dir, dtype, mtp=mtp, ignore_kv_scales=ignore_kv_scales)
    source = _changed(opened, layers, resize_vocab, allow_cut)
    total, done = bytes_written(source, to), 0

    def count(name: str, size: int) -> None:
        nonlocal done
        done += size
        report(name, done, total)

    if to == 'hf':
        companions = {'source_dir': opened.assets, 'origin': opened.origin}
        write_hf(source, output_dir, **companions, max_shard_size=max_shard_size, layout=layout, report=count)
    else:
        write_model(source, output_dir, assets=opened.assets, origin=opened.origin, report=count)
    files = Path(output_dir).rglob('*.safetensors' if to == 'hf' else 'state/**/d/*')
    return _made(source, total, [path.stat().st_size for path in files], time.perf_counter() - start)


def _changed(opened: Opened, layers: Sequence[int] | None, vocab_size: int | None, allow_cut: bool) -> LeafSource:
    """The model with fewer layers or another vocabulary, as far as these are asked for."""
    source = opened.source
    if layers is not None:
        source = SelectedLayers(source, layers)
    if vocab_size is not None:
        tokenizer = open_tokenizer(opened.assets)
        used = None if tokenizer is None else tokenizer.vocab_size
        source = ResizedSource(source, vocab_size, used=used, allow_cut=allow_cut)
    return source


def parse_layers(text: str) -> tuple[int, ...]:
    """Numbers from '0-3,6'.

    Raises:
        ValueError: something else.
    """
    found: list[int] = []
    for part in text.split(','):
        ends = part.strip().split('-')
        if not 1 <= len(ends) <= 2 or not all(end.isdigit() for end in ends):
            raise ValueError(f"--layers={text}: {part!r}: expected numbers and ranges, such as '0-3,6'")
        found += range(int(ends[0]), int(ends[-1]) + 1)
    return tuple(found)


def bytes_written(source: LeafSource, to: str) -> int:
    """Bytes of all weights; files of Hugging Face hold some of them more than once."""

    def times(leaf: Leaf) -> int:
        return 1 + len(leaf.sources[0].copies) if to == 'hf' else 1

    return sum(times(leaf) * math.prod(leaf.shape) * source.dtype(leaf).itemsize for leaf in leaves_of(source))


def _made(source: LeafSource, total: int, files: list[int], seconds: float) -> Conversion:
    """What was written: `total` bytes of weights, in files of these sizes."""
    wanted = leaves_of(source)
    return Conversion(
        family=source.cfg.family,
        parameters=sum(math.prod(leaf.shape) for leaf in leaves(source.cfg)),
        bytes=total,
        dtypes=', '.join(sorted({str(source.dtype(leaf)) for leaf in wanted})),
        vocabulary=source.cfg.vocab_size,
        files=len(files),
        largest_file=max(files),
        seconds=seconds,
    )


def peak_memory() -> int:
    """The most memory that this process has held resident, in bytes."""
    status = Path('/proc/self/status')
    if status.is_file():  # getrusage would count what the parent held when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith('VmHWM'))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 1024


def size_text(count: float) -> str:
    """Bytes in a unit that suits them, powers of ten: '1.50 GB'."""
    for unit in ('B', 'kB', 'MB', 'GB'):
        if count < 1000:
            return f'{count:.0f} {unit}' if unit in ('B', 'kB') else f'{count:.2f} {unit}'
        count /= 1000
    return f'{count:.2f} TB'


def _print_table(result: Conversion, output: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f'Converted to {output}', show_header=False)
    rows = (
        ('model', f'{result.family}, {result.parameters:,} parameters, vocabulary {result.vocabulary:,}'),
        ('weights', f'{size_text(result.bytes)} in {result.dtypes}'),
        ('files', f'{result.files}, the largest {size_text(result.largest_file)}'),
        ('time', f'{result.seconds:.1f} s, {size_text(result.bytes / max(result.seconds, 1e-9))}/s'),
        ('peak memory', size_text(peak_memory())),
    )
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def progress() -> Callable[[str, int, int], None]:
    """A report for `convert` that prints a line at every tenth of the way."""
    told = -1

    def show(name: str, done: int, total: int) -> None:
        nonlocal told
        tenth = 10 * done // max(total, 1)
        if tenth > told:
            told = tenth
            print(f'{100 * done / max(total, 1):5.1f} %  {size_text(done)} of {size_text(total)}  {name}', flush=True)

    return show


def _define_flags() -> None:
    flags.DEFINE_string('input', None, 'A Hugging Face directory, a jpt checkpoint, or the workdir of a training run.')
    flags.DEFINE_string('output', None, 'The directory to make.')
    flags.DEFINE_enum('to', None, FORMATS, 'Hugging Face directory or jpt checkpoint.')
    flags.DEFINE_enum(
        'dtype', None, list(CAST_TARGETS), 'Cast floating-point weights; by default they stay as they are.'
    )
    flags.DEFINE_string('max_shard_size', '5GB', 'Largest safetensors file, such as 5GB or 512MiB.')
    flags.DEFINE_integer('resize_vocab', None, 'Rows of embedding and unembedding; new ones are the mean of the old.')
    flags.DEFINE_boolean('allow_cut', False, 'With --resize_vocab: let rows go that the tokenizer uses.')
    flags.DEFINE_string('layers', None, 'Keep these layers only, such as 0-3,6: where a smaller student begins.')
    flags.DEFINE_enum(
        'layout',
        None,
        list(LAYOUTS),
        'With --to=hf: how quantized weights lie; by default the first that holds them.',
    )
    flags.DEFINE_boolean(
        'ignore_kv_scales', False, 'Leave out that keys and values are kept in eight bits, and their scales.'
    )
    flags.DEFINE_boolean('mtp', True, 'Keep modules that predict further tokens, where there are any.')
    flags.mark_flags_as_required(['input', 'output', 'to'])


def main(argv: list[str]) -> None:
    """The command line."""
    if len(argv) > 1:
        raise app.UsageError(f'unexpected arguments {argv[1:]}')
    logging.set_verbosity(logging.WARNING)  # Orbax tells its every step
    jax.config.update('jax_platforms', 'cpu')  # nothing is computed here, and another job may hold the GPU
    args = flags.FLAGS
    try:
        result = convert(
            args.input,
            args.output,
            args.to,
            dtype=args.dtype,
            max_shard_size=args.max_shard_size,
            resize_vocab=args.resize_vocab,
            allow_cut=args.allow_cut,
            mtp=args.mtp,
            layers=None if args.layers is None else parse_layers(args.layers),
            layout=args.layout,
            ignore_kv_scales=args.ignore_kv_scales,
            report=progress(),
        )
    except (OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(1)
    _print_table(result, args.output)


if __name__ == '__main__':
    _define_flags()
    app.run(main)
