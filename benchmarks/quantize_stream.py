"""Time and memory of quantizing a checkpoint from files to files, beside ModelOpt's exporter on one matrix.

    python benchmarks/quantize_stream.py --gigabytes=4 --peer=/path/to/python/with/modelopt --json

Writes a bfloat16 Llama of normal weights in shards, has `python -m jpt.quantize --config.stream=True` quantize it in a
process of its own for each format and kind of output, and compares some matrices of what it wrote with
`jpt.quant.tensors.quantize` of the whole matrix, bit by bit. The peer right after: ModelOpt loads the same directory,
quantizes its weights and exports it, in a process of its own too, with all of the model in memory; and it quantizes one
matrix again and again. Takes twice the size on disk, in a temporary directory that is removed.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from quantize_speed import theirs
from synthetic import llama_config, normal_values, write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SMALL = {'width': 512, 'mlp': 1792, 'vocab': 4096}
PEER = """
import sys, torch
import modelopt.torch.quantization as mtq
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
mtq.quantize(model, mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG)
export_hf_checkpoint(model, export_dir=sys.argv[2])
"""  # blocks of 128 x 128, weights alone: no text
RUNS = (('fp8_block', 'hf'), ('fp8_block', 'jpt'), ('int8', 'hf'), ('nvfp4_weights', 'hf'))


def run_command(source: Path, target: Path, form: str, to: str) -> dict[str, Any]:
    """Quantizes in a process of its own: what it took."""
    command = [sys.executable, '-m', 'jpt.quantize', f'--config={ROOT}/configs/quantize.py:{source},{form}']
    command += ['--config.stream=True', f'--config.to={to}', f'--output={target}']
    command += ['--config.max_shard_size=1GB'] if to == 'hf' else []
    return measured(command, target)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own: the largest memory of this one is what others begin with."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        return pool.submit(function, *arguments).result()


def write_normal(directory: Path, config: dict[str, Any], shard: str) -> None:
    """Writes a checkpoint of normal weights."""
    write_checkpoint(directory, config, normal_values(), shard)


def measured(command: list[str], target: Path) -> dict[str, Any]:
    """Seconds of all of a process, of the processors too, its largest memory, and the bytes that it wrote."""
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=target.parent,  # not where this file lies, whose neighbours have names of packages
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f'{command}: exit code {process.returncode}: {said.decode()[-2000:]}')
    return {
        'seconds': time.perf_counter() - start,
        'processor_seconds': used.ru_utime + used.ru_stime,
        'peak_bytes': used.ru_maxrss * 1024,
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
    sizes = {'width': 4096, 'mlp': 14336, 'vocab': 32_768} if gigabytes >= 1 else SMALL
    apart(write_normal, source, llama_config(gigabytes, heads=32, **sizes), shard)
    runs, target = {}, folder / 'out'
    for form, to in RUNS:
        if wanted and form not in wanted:
            continue
        run = run_command(source, target, form, to)
        run['bit_exact'] = apart(same_bits, source, target, form)
        runs[f'{form} to {to}'] = run
        shutil.rmtree(target)
        print(f'{form} to {to}: {run}', flush=True)
    if peer is not None:
        runs['ModelOpt, blocks of 128 x 128'] = measured([peer, '-c', PEER, str(source), str(target)], target)
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
        speed = result['bytes'] / 2e6 / run['seconds']
        sizes = f'{run["peak_bytes"] / 1e6:,.0f} | {run["bytes"] / 1e9:.2f}'
        exact = {True: 'yes', False: 'NO', None: ''}[run.get('bit_exact')]
        print(f'| {name} | {times} | {speed:.0f} | {sizes} | {exact} |')
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
