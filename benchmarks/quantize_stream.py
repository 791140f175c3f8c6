"""Time and memory of quantizing a checkpoint from files to files, beside ModelOpt's exporter on one matrix.

    python benchmarks/quantize_stream.py --gigabytes=4 --peer=/path/to/python/with/modelopt --json

Writes a bfloat16 Llama of normal weights in shards, has `python -m jpt.quantize --config.stream=True` quantize it in a
process of its own for each format and kind of output, and compares some matrices of what it wrote with
`jpt.quant.tensors.quantize` of the whole matrix, bit by bit. The peer quantizes one matrix in memory, again and again,
right after. Takes twice the size on disk, in a temporary directory that is removed.
"""

import argparse
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from quantize_speed import theirs

ROOT = Path(__file__).resolve().parents[1]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
RUNS = (('fp8_block', 'hf'), ('fp8_block', 'jpt'), ('int8', 'hf'), ('nvfp4_weights', 'hf'))


def llama_config(gigabytes: float) -> dict[str, Any]:
    """A Llama of about so many bytes in bfloat16, with the layers of an 8 B model where they fit."""
    width, mlp, vocab = (4096, 14336, 32_768) if gigabytes >= 1 else (512, 1792, 4096)
    layer = 2 * (2 * width**2 + width**2 // 2 + 3 * width * mlp)
    return {
        'model_type': 'llama',
        'architectures': ['LlamaForCausalLM'],
        'vocab_size': vocab,
        'hidden_size': width,
        'intermediate_size': mlp,
        'num_hidden_layers': max(1, round((gigabytes * 1e9 - 4 * vocab * width) / layer)),
        'num_attention_heads': 32,
        'num_key_value_heads': 8,
        'max_position_embeddings': 8192,
        'rms_norm_eps': 1e-5,
        'tie_word_embeddings': False,
        'dtype': 'bfloat16',
    }


def write_checkpoint(directory: Path, config: dict[str, Any], shard: str) -> None:
    """Writes the config, and normal weights of spread 0.02 for every tensor."""
    from jpt.checkpoint.hf_export import tensors_of
    from jpt.checkpoint.safetensors import TensorSpec
    from jpt.checkpoint.shards import ShardedWriter
    from jpt.models.families import config_from_hf

    directory.mkdir(parents=True)
    (directory / 'config.json').write_text(json.dumps(config))
    specs = {}
    for name, parts in tensors_of(config_from_hf(config)).items():
        specs[name] = TensorSpec(BFLOAT16, parts[0].source.stored_shape(parts[0].shape))
    random = np.random.default_rng(0)
    pool = (0.02 * random.standard_normal(2**24, np.float32)).astype(BFLOAT16)
    with ShardedWriter(directory, specs, shard) as writer:
        for name, spec in specs.items():
            start = int(random.integers(0, 2**20))
            writer.write(name, np.resize(pool[start:], spec.shape))


def run_command(source: Path, target: Path, form: str, to: str) -> dict[str, float]:
    """Quantizes in a process of its own: seconds, of the processors too, and what it says of itself."""
    command = [sys.executable, '-m', 'jpt.quantize', f'--config={ROOT}/configs/quantize.py:{source},{form}']
    command += ['--config.stream=True', f'--config.to={to}', '--config.max_shard_size=1GB', f'--output={target}']
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = re.search(r'([\d.]+) s, ([\d.]+) M weights/s, peak memory ([\d.]+) (MB|GB)', done.stdout)
    assert found is not None, done.stdout
    return {
        'seconds': float(found[1]),
        'processor_seconds': after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        'weights_per_second': 1e6 * float(found[2]),
        'peak_bytes': float(found[3]) * (1e6 if found[4] == 'MB' else 1e9),
        'bytes': sum(path.stat().st_size for path in target.rglob('*') if path.is_file()),
        'load': os.getloadavg()[0],
    }


def same_bits(source: Path, target: Path, form: str) -> bool:
    """Whether matrices of the first and the last layer are what quantizing them whole gives."""
    import jax

    from jpt.checkpoint.opening import open_model
    from jpt.checkpoint.source import leaves_of
    from jpt.quant.formats import FORMATS
    from jpt.quant.packing import parts_of
    from jpt.quant.tensors import quantize

    before, after = open_model(source).source, open_model(target).source
    whole = {leaf.path: leaf for leaf in leaves_of(before)}
    parts = {leaf.path: leaf for leaf in leaves_of(after)}
    same = True
    for name, at in (('k', 0), ('out', -1), ('down', -1)):
        path = next(path for path in whole if path[0] == 'layers' and path[-2] == name)
        layer = range(whole[path].shape[0])[at]
        here = slice(layer, layer + 1)
        second = None
        if (*path, 'scale_2') in parts:
            second = after.read(parts[*path, 'scale_2'], (here, slice(0, 1), slice(0, 1)))
        index = (here, *(slice(0, size) for size in whole[path].shape[1:]))
        made = jax.jit(quantize, static_argnums=1)(before.read(whole[path], index), FORMATS[form], scale_2=second)
        for part, values in parts_of(made).items():
            leaf = parts[*path, part]
            stored = after.read(leaf, (here, *(slice(0, size) for size in leaf.shape[1:])))
            same = same and np.array_equal(np.asarray(values).view(np.uint8), stored.view(np.uint8))
    return same


def measure(gigabytes: float, shard: str, folder: Path, peer: str | None, wanted: list[str]) -> dict[str, Any]:
    """Runs the benchmark in `folder`, removing what is not needed any more."""
    source = folder / 'model'
    write_checkpoint(source, llama_config(gigabytes), shard)
    runs = {}
    for form, to in RUNS:
        if wanted and form not in wanted:
            continue
        target = folder / 'out'
        run: dict[str, Any] = run_command(source, target, form, to)
        run['bit_exact'] = same_bits(source, target, form)
        runs[f'{form} to {to}'] = run
        shutil.rmtree(target)
        print(f'{form} to {to}: {run}', flush=True)
    files = [path.stat().st_size for path in source.glob('*.safetensors')]
    return {
        'machine': f'{platform.machine()}, {os.cpu_count()} cores',
        'versions': f'Python {platform.python_version()}, jax {version("jax")}',
        'bytes': sum(files),
        'files': len(files),
        'largest_file': max(files),
        'runs': runs,
        'modelopt_in_memory': {name: 1e6 * speed for name, speed in theirs(peer, 5).items()},
    }


def print_table(result: dict[str, Any]) -> None:
    """One row per run, and the peer's."""
    print(
        f'{result["bytes"] / 1e9:.2f} GB bfloat16 in {result["files"]} files, the largest '
        f'{result["largest_file"] / 1e6:,.0f} MB; {result["machine"]}, {result["versions"]}'
    )
    columns = (
        'format, output',
        'seconds',
        "processors' seconds",
        'load',
        'M weights/s',
        'peak MB',
        'GB written',
        'exact',
    )
    print(f'| {" | ".join(columns)} |\n| --- |{" ---: |" * 6} --- |')
    for name, run in result['runs'].items():
        times = f'{run["seconds"]:.1f} | {run["processor_seconds"]:.1f} | {run["load"]:.1f}'
        sizes = f'{run["peak_bytes"] / 1e6:,.0f} | {run["bytes"] / 1e9:.2f} | {"yes" if run["bit_exact"] else "NO"}'
        print(f'| {name} | {times} | {run["weights_per_second"] / 1e6:.0f} | {sizes} |')
    for name, speed in result['modelopt_in_memory'].items():
        print(f'ModelOpt, {name}, one matrix in memory: {speed / 1e6:.0f} M weights/s')


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--gigabytes', type=float, default=4.0)
    parser.add_argument('--shard', default='1GB', help='largest safetensors file')
    parser.add_argument('--folder', default=None, help='where the temporary directory is made')
    parser.add_argument('--formats', default='', help='these formats only, with commas between them')
    parser.add_argument('--peer', help='a Python with nvidia-modelopt and torch')
    parser.add_argument('--json', action='store_true', help='print one JSON object as the last line')
    args = parser.parse_args()
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    wanted = [name for name in args.formats.split(',') if name]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = measure(args.gigabytes, args.shard, Path(folder), args.peer, wanted)
    print_table(result)
    if args.json:
        print(json.dumps({'benchmark': 'quantize_stream'} | result))


if __name__ == '__main__':
    main()
