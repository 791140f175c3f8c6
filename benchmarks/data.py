"""Speed and fill of the data pipeline on real corpora.

    python benchmarks/data.py --data=../shared/data --json

For each corpus and row length: documents and tokens per second through make_pipeline, one epoch, prefetch on, and
tokens per second of processor time (which a busy machine changes less), beside that of the tokenizer alone on the same
texts (the roofline of text); and the share of positions that hold a token beside three others: the least number of rows
that could hold the tokens, best-fit decreasing alone, and one document to a row.
The standard library is always among the corpora; the others are left out where the folder is missing.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jpt.data.indexed import IndexedWriter
from jpt.data.packing import best_fit_decreasing, cut, fill
from jpt.data.pipeline import DataConfig, make_pipeline
from jpt.data.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]


def chat(path: str, prompt: str, completion: str) -> dict[str, Any]:
    """Conversations of one question and answer; the few that are longer than a row are left out, and counted."""
    return {
        'paths': (path,),
        'kind': 'chat',
        'long_documents': 'drop',
        'prompt_key': prompt,
        'completion_key': completion,
    }


CORPORA: dict[str, dict[str, Any]] = {
    'tinystories': {'paths': ('text/tinystories_1k.jsonl.xz', 'text/tinystories_v2_head.jsonl.xz')},
    'c4': {'paths': ('text/c4_demo.jsonl.xz',)},
    'books': {'paths': ('text/books_valid.txt.xz',), 'separator': '<|endoftext|>'},
    'gsm8k (chat)': chat('math/gsm8k_train.jsonl.xz', 'question', 'answer'),
    'dolly (chat)': chat('chat/dolly_open_qa.jsonl.xz', 'instruction', 'response'),
    'p3 (chat)': chat('chat/p3_subset.jsonl.xz', 'prompt', 'completion'),
}


def measure(name: str, config: DataConfig, tokenizer: Tokenizer, seq_len: int) -> dict[str, Any]:
    """One epoch through the pipeline, and the same lengths packed in other ways."""
    pipeline = make_pipeline(config, tokenizer, batch_size=8, seq_len=seq_len, num_epochs=1)
    started, cpu = time.perf_counter(), time.process_time()
    first = 0.0
    lengths: list[int] = []
    for batch in pipeline:
        first = first or time.perf_counter() - started
        for row in batch.segment_ids:
            lengths += np.bincount(row)[1:].tolist()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    progress = pipeline.progress()
    pipeline.close()
    pieces = cut(lengths, seq_len)
    return {
        'corpus': name,
        'seq_len': seq_len,
        'documents': progress['documents'],
        'tokens': progress['tokens'],
        'documents_per_second': progress['documents'] / seconds,
        'tokens_per_second': progress['tokens'] / seconds,
        'tokens_per_cpu_second': progress['tokens'] / cpu,
        'first_batch_seconds': first,
        'rows': progress['rows'],
        'least_rows': -(-int(progress['tokens']) // seq_len),
        'fill': progress['fill'],
        'fill_possible': progress['tokens'] / (-(-int(progress['tokens']) // seq_len) * seq_len),
        'fill_best_fit_decreasing': fill(best_fit_decreasing(pieces, seq_len), seq_len),
        'fill_unpacked': fill([[piece] for piece in pieces], seq_len),
    }


def tokenizer_alone(config: DataConfig, tokenizer: Tokenizer) -> float:
    """Tokens per second of processor time of encode_batch on the texts of the corpus."""
    from jpt.data.sources import open_source

    reader = [open_source(path, config.fields, config.is_chat, config.separator) for path in config.paths]
    texts = []
    for source in reader:
        for i in range(len(source)):
            record: Any = source[i]
            text = record if isinstance(record, str) else ' '.join(m['content'] for m in record.messages)
            texts.append(text)
    started = time.process_time()
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts))
    return tokens / (time.process_time() - started)


def write_indexed(config: DataConfig, tokenizer: Tokenizer, folder: Path) -> DataConfig:
    """The documents of a text corpus, tokenized once into .bin/.idx."""
    from jpt.data.sources import open_source

    source = open_source(config.paths[0])
    with IndexedWriter(folder / 'corpus', tokenizer.vocab_size) as writer:
        for ids in tokenizer.encode_batch([str(source[i]) for i in range(len(source))], eos=True):
            writer.add(ids)
    return DataConfig(paths=(str(folder / 'corpus'),))


def import_seconds() -> float:
    """Processor seconds of `import jpt.data.pipeline` in a fresh interpreter, the interpreter's own start taken off."""

    def run(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(run('import jpt.data.pipeline') for _ in range(3)) - min(run('pass') for _ in range(3))


def corpora(data: Path) -> dict[str, DataConfig]:
    """The corpora that are there."""
    found = {'stdlib': DataConfig(paths=('stdlib:held_out',))}
    for name, values in CORPORA.items():
        paths = tuple(str(data / path) for path in values['paths'])
        if all(Path(path).is_file() for path in paths):
            found[name] = DataConfig(**values | {'paths': paths})
    return found


def main() -> None:
    """Prints the table, and with --json one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else '')
    parser.add_argument('--data', type=Path, default=ROOT.parent / 'shared' / 'data')
    parser.add_argument('--tokenizer', type=Path, help='model folder; default: jpt-bpe-8k of the data folder, or ours')
    parser.add_argument('--seq-len', type=int, nargs='+', default=[512, 1024, 2048])
    parser.add_argument('--corpora', nargs='+', help='names, such as stdlib tinystories; default all')
    parser.add_argument('--json', action='store_true')
    options = parser.parse_args()
    folder = options.tokenizer or options.data / 'tokenizers' / 'jpt-bpe-8k'
    if not folder.is_dir():
        folder = ROOT / 'jpt' / 'assets' / 'quickstart_teacher'
    tokenizer = Tokenizer.load(folder)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        configs = corpora(options.data)
        if 'tinystories' in configs:
            configs['indexed'] = write_indexed(configs['tinystories'], tokenizer, Path(temporary))
        for name, config in configs.items():
            if options.corpora and name not in options.corpora:
                continue
            alone = None if name == 'indexed' else tokenizer_alone(config, tokenizer)
            for seq_len in options.seq_len:
                results.append(measure(name, config, tokenizer, seq_len) | {'tokenizer_tokens_per_cpu_second': alone})
    report = {
        'machine': {'cpus': os.cpu_count(), 'load': os.getloadavg()[0], 'python': platform.python_version()},
        'versions': {name: version(name) for name in ('grain', 'tokenizers', 'numpy', 'jinja2')},
        'tokenizer': folder.name,
        'vocab_size': tokenizer.vocab_size,
        'import_cpu_seconds': import_seconds(),
        'results': results,
    }
    show(report)
    if options.json:
        print(json.dumps(report))


def show(report: dict[str, Any]) -> None:
    """The report as a table."""
    machine = report['machine']
    title = f'{machine["cpus"]} CPUs (load {machine["load"]:.1f}), Python {machine["python"]}, {report["tokenizer"]}'
    table = Table(title=title)
    heads = (
        'corpus',
        'row',
        'documents',
        'documents/s',
        'tokens/s',
        'tokens/CPU s',
        'tokenizer alone',
        'first batch',
        'fill',
    )
    for head in (*heads, 'possible', 'decreasing', 'unpacked'):
        table.add_column(head, justify='left' if head == 'corpus' else 'right')
    for result in report['results']:
        alone = result['tokenizer_tokens_per_cpu_second']
        table.add_row(
            result['corpus'],
            str(result['seq_len']),
            f'{result["documents"]:,}',
            f'{result["documents_per_second"]:,.0f}',
            f'{result["tokens_per_second"]:,.0f}',
            f'{result["tokens_per_cpu_second"]:,.0f}',
            '-' if alone is None else f'{alone:,.0f}',
            f'{result["first_batch_seconds"]:.2f} s',
            *(f'{result[key]:.4f}' for key in ('fill', 'fill_possible', 'fill_best_fit_decreasing', 'fill_unpacked')),
        )
    console = Console(width=150)
    console.print(table)
    console.print(f'import jpt.data.pipeline: {report["import_cpu_seconds"]:.2f} s of processor time')


if __name__ == '__main__':
    main()
