"""How fast weights are quantized on CPU, and how fast ModelOpt's exporter is on the same matrix.

    python benchmarks/quantize_speed.py --peer=/path/to/python/with/modelopt --json

A bfloat16 matrix of the size of a Llama 8B's MLP is quantized again and again; the best of several times counts. The
peer runs in an interpreter of its own, where nvidia-modelopt and torch are, right after.
"""

import argparse
import functools
import json
import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np

SHAPE = (14336, 4096)
FORMATS = ('fp8_block', 'fp8_tensor', 'fp8_channel_token', 'mxfp8', 'nvfp4', 'int8', 'int4_weights')
PEER = """
import json, sys, time, torch
from modelopt.torch.export.quant_utils import to_quantized_weight
from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor
torch.set_num_threads(int(sys.argv[1]))
w = torch.randn(14336, 4096).to(torch.bfloat16)
def fp8_block():
    blocks = w.reshape(112, 128, 32, 128)
    scale = (blocks.abs().amax(dim=(1, 3), keepdim=True).float() / 448)
    return to_quantized_weight(w, scale, 'fp8_pb_wo', block_size=128)
def fp8_tensor():
    return to_quantized_weight(w, w.abs().max().float() / 448, 'fp8')
def fp8_channel_token():
    return to_quantized_weight(w, w.abs().amax(dim=1).float() / 448, 'fp8_pc_pt')
def mxfp8():
    return to_quantized_weight(w, MXFP8QTensor.get_weights_scaling_factor(w), 'mxfp8')
def nvfp4():
    second = w.abs().max().float() / (6 * 448)
    scale, _ = NVFP4QTensor.get_weights_scaling_factor(w, 16, second)
    return to_quantized_weight(w, scale, 'nvfp4', second, 16)
def int8():
    return to_quantized_weight(w, w.abs().amax(dim=1).float() / 127, 'int8_sq')
def int4_weights():
    return to_quantized_weight(w, w.reshape(14336, 32, 128).abs().amax(dim=2).float() / 7, 'int4_awq', None, 128)
found = {}
for name in sys.argv[3:]:
    run = globals()[name]
    run()
    best = 1e9
    for _ in range(int(sys.argv[2])):
        start = time.perf_counter(); run(); best = min(best, time.perf_counter() - start)
    found[name] = w.numel() / best / 1e6
print(json.dumps(found))
"""


def best_of(run: Callable[[], Any], times: int) -> float:
    """Seconds of the fastest of several runs, after one that compiles."""
    run()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def ours(times: int) -> dict[str, float]:
    """Million weights a second by format."""
    import jax
    import ml_dtypes

    from jpt.quant.formats import FORMATS as KNOWN
    from jpt.quant.tensors import quantize

    weight = jax.device_put(np.random.default_rng(0).standard_normal(SHAPE, np.float32).astype(ml_dtypes.bfloat16))
    run = jax.jit(quantize, static_argnums=1)
    found = {}
    for name in FORMATS:
        seconds = best_of(functools.partial(lambda form: jax.block_until_ready(run(weight, form)), KNOWN[name]), times)
        found[name] = weight.size / seconds / 1e6
    return found


def theirs(python: str | None, times: int) -> dict[str, float]:
    """The same of ModelOpt, where an interpreter with it is given."""
    if python is None:
        return {}
    command = [python, '-c', PEER, str(os.cpu_count()), str(times), *FORMATS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints a table, and with --json one line of JSON at the end."""
    parser = argparse.ArgumentParser(description='Speed of quantizing on CPU.')
    parser.add_argument('--peer', help='a Python with nvidia-modelopt and torch')
    parser.add_argument('--times', type=int, default=7)
    parser.add_argument('--json', action='store_true')
    options = parser.parse_args()
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    mine, peer = ours(options.times), theirs(options.peer, options.times)
    print(
        f'{os.cpu_count()} cores, {SHAPE[0]} x {SHAPE[1]} bfloat16, best of {options.times}; million weights a second'
    )
    print('| format | jpt | ModelOpt |\n| --- | ---: | ---: |')
    for name, speed in mine.items():
        print(f'| {name} | {speed:.0f} | {f"{peer[name]:.0f}" if name in peer else ""} |')
    if options.json:
        print(json.dumps({'benchmark': 'quantize_speed', 'jpt': mine, 'modelopt': peer}))


if __name__ == '__main__':
    main()
