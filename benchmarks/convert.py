"""Memory and speed of python -m jpt.convert on a synthetic checkpoint: Hugging Face -> jpt -> Hugging Face.

    python benchmarks/convert.py --gigabytes=4 --json

Writes a random bfloat16 Llama in shards, converts it in a process of its own each way, compares the result with the
original bit by bit, and prints the peak resident memory of each process beside the largest shard, the largest leaf (a
weight of all layers together) and what a process that converts next to nothing needs. Takes three times the size on
disk, in a temporary directory that is removed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from synthetic import any_values, llama_config, write_checkpoint

from jpt.checkpoint.shards import ShardedReader, parse_size
from jpt.models.config import ModelConfig
from jpt.models.names import leaves


def random_llama(directory: Path, gigabytes: float, shard: str) -> ModelConfig:
    """Writes a Llama of about so many bytes, in the proportions of a 3 B model."""
    width, mlp, vocab = (2048, 8192, 65_536) if gigabytes >= 1 else (128, 512, 1024)
    return write_checkpoint(directory, llama_config(gigabytes, width, mlp, vocab, heads=16), any_values(), shard)


PROGRAM = """
import json, sys
from jpt.convert import convert, peak_memory
result = convert(sys.argv[1], sys.argv[2], sys.argv[3], max_shard_size=sys.argv[4])
print(json.dumps({'peak_bytes': peak_memory(), 'seconds': result.seconds}))
"""


def run_convert(source: Path, target: Path, to: str, shard: str) -> dict[str, float]:
    """Converts in a process of its own: its peak resident bytes, and the seconds that the conversion took."""
    command = [sys.executable, '-c', PROGRAM, str(source), str(target), to, shard]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ | {'JAX_PLATFORMS': 'cpu'})
    return json.loads(done.stdout.splitlines()[-1])


def same_bits(one: Path, other: Path) -> bool:
    """Whether two directories hold the same tensors, bit for bit."""
    left, right = ShardedReader(one), ShardedReader(other)
    if left.tensors != right.tensors:
        return False

    def crc(reader: ShardedReader, name: str) -> int:
        checksum = zlib.crc32(np.ascontiguousarray(reader.view(name)).reshape(-1).view(np.uint8).data)
        reader.release(name)
        return checksum

    return all(crc(left, name) == crc(right, name) for name in left.tensors)


def measure(gigabytes: float, shard: str, folder: Path) -> dict[str, Any]:
    """Runs the benchmark in `folder`, removing what is not needed any more."""
    random_llama(folder / 'tiny', 0.002, shard)
    tiny = {
        'to jpt': run_convert(folder / 'tiny', folder / 'tiny_jpt', 'jpt', shard)['peak_bytes'],
        'to hf': run_convert(folder / 'tiny_jpt', folder / 'tiny_hf', 'hf', shard)['peak_bytes'],
    }
    cfg = random_llama(folder / 'hf', gigabytes, shard)
    reader = ShardedReader(folder / 'hf')
    total = sum(spec.nbytes for spec in reader.tensors.values())
    runs = {
        'to jpt': run_convert(folder / 'hf', folder / 'jpt', 'jpt', shard),
        'to hf': run_convert(folder / 'jpt', folder / 'back', 'hf', shard),
    }
    for name, run in runs.items():
        run['empty_process_bytes'] = tiny[name]
        run['bytes_per_second'] = total / run['seconds']
    return {
        'machine': f'{platform.machine()}, {os.cpu_count()} cores',
        'versions': f'Python {platform.python_version()}, jax {jax.__version__}, orbax {version("orbax-checkpoint")}',
        'bytes': total,
        'largest_shard': max(path.stat().st_size for path in (folder / 'hf').glob('*.safetensors')),
        'largest_tensor': max(spec.nbytes for spec in reader.tensors.values()),
        'largest_leaf': max(2 * int(np.prod(leaf.shape)) for leaf in leaves(cfg)),
        'bit_exact': same_bits(folder / 'hf', folder / 'back'),
        'runs': runs,
    }


def print_table(result: dict[str, Any]) -> None:
    """One row per direction, memory in MB."""
    title = f'{result["bytes"] / 1e9:.2f} GB bfloat16, {result["machine"]}, {result["versions"]}'
    table = Table(title=title, caption=f'round trip bit-exact: {result["bit_exact"]}')
    columns = ('', 'peak MB', 'of it process MB', 'shard MB', 'leaf MB', 'tensor MB', 'seconds', 'MB/s')
    for column in columns:
        table.add_column(column, justify='right')
    for name, run in result['runs'].items():
        sizes = (
            run['peak_bytes'],
            run['empty_process_bytes'],
            *(result[f'largest_{k}'] for k in ('shard', 'leaf', 'tensor')),
        )
        cells = [f'{size / 1e6:,.0f}' for size in sizes]
        table.add_row(name, *cells, f'{run["seconds"]:.1f}', f'{run["bytes_per_second"] / 1e6:,.0f}')
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--gigabytes', type=float, default=4.0)
    parser.add_argument('--shard', default='1GB', help='largest safetensors file')
    parser.add_argument('--folder', default=None, help='where the temporary directory is made')
    parser.add_argument('--json', action='store_true', help='print one JSON object as the last line')
    args = parser.parse_args()
    parse_size(args.shard)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = measure(args.gigabytes, args.shard, Path(folder))
    print_table(result)
    if args.json:
        print(json.dumps(result))


if __name__ == '__main__':
    main()
