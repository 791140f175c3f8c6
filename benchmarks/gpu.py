"""Training and decoding on one GPU, beside published numbers and the bandwidth of its memory.

    python benchmarks/gpu.py [--repeats=10] [--json]      (--tiny: small shapes, to try the script on a CPU)

Training: bfloat16 products, float32 parameters, AdamW, rows of 4,096 tokens that are one text each. MFU counts
attention causally (jpt/training/flops.py). The 1.7B shape is the first row of the weak-scaling table of Megatron-LM's
README (48 H100, its data-parallel communication included; learned positions here, rotary ones there). MaxText publishes
52.6 % for dense bfloat16 models on H100. Decoding: a model of Qwen3-8B's shape with random bfloat16 weights, one row,
greedy; the bound is the time in which the memory of the GPU gives every weight once.
"""

import argparse
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jobs import random_job, step_of
from timing import in_turn, machine

import jpt
from jpt.generation.engine import generate
from jpt.models.families import config_from_hf
from jpt.models.shapes import QWEN3_8B
from jpt.models.transformer import init
from jpt.sharding.topology import CHIPS
from jpt.training.flops import mfu
from jpt.training.overview import count_parameters, flops_of

MEGATRON = {
    'model_type': 'gpt2',
    'vocab_size': 131072,
    'n_embd': 2048,
    'n_layer': 24,
    'n_head': 16,
    'n_positions': 4096,
    'tie_word_embeddings': False,
}
LLAMA_3B = {
    'model_type': 'llama',
    'vocab_size': 128256,
    'hidden_size': 3072,
    'intermediate_size': 8192,
    'num_hidden_layers': 28,
    'num_attention_heads': 24,
    'num_key_value_heads': 8,
    'head_dim': 128,
    'max_position_embeddings': 4096,
    'rms_norm_eps': 1e-5,
    'rope_theta': 500000.0,
    'tie_word_embeddings': True,
}
# Shape, rows, settings, published tokens per second and GPU, published MFU.
TRAINING: dict[str, tuple[dict[str, Any], int, dict[str, Any], float | None, float]] = {
    'Megatron 1.7B': (MEGATRON, 4, {'compute': {'dtype': 'bfloat16', 'remat': 'full'}}, 36_259, 0.369),
    'Llama 3.2 3B': (
        LLAMA_3B,
        4,
        {'compute': {'dtype': 'bfloat16', 'remat': 'full'}, 'optimizer': {'moments': 'bfloat16'}},
        None,
        0.526,
    ),
}
TINY = {
    'vocab_size': 512,
    'num_hidden_layers': 2,
    'n_layer': 2,
    'hidden_size': 64,
    'n_embd': 64,
    'intermediate_size': 128,
}


def smaller(shape: dict[str, Any]) -> dict[str, Any]:
    """The same kind of model, small enough for a CPU."""
    small = {name: TINY.get(name, value) for name, value in shape.items()}
    return small | {name: 4 for name in ('num_attention_heads', 'num_key_value_heads', 'n_head') if name in shape}


def train(name: str, tiny: bool, repeats: int) -> dict[str, Any]:
    """Tokens per second and MFU of one shape, with what is published."""
    shape, rows, settings, published, published_mfu = TRAINING[name]
    length = 64 if tiny else 4096
    job, batch = random_job(smaller(shape) if tiny else shape, rows, length, **settings)
    best = in_turn({'jpt': step_of(job, batch)}, repeats)['jpt']
    rate = 1e3 * rows * length / best.wall_ms
    share = mfu(flops_of(job), rate, 1, jax.devices()[0].device_kind)
    parameters = count_parameters(job.state.params)
    row = {'what': 'training', 'shape': name, 'parameters': parameters, 'tokens_per_second': rate, 'mfu': share}
    return {**row, 'published_tokens_per_second': published, 'published_mfu': published_mfu}


def decode(tiny: bool, repeats: int) -> dict[str, Any]:
    """Milliseconds per token of one row, and how long reading the weights takes at best."""
    cfg = config_from_hf(smaller(QWEN3_8B) if tiny else QWEN3_8B)
    params = jax.jit(functools.partial(init, cfg, dtype=jnp.bfloat16))(jax.random.key(0))
    model = jpt.Model(cfg, params)
    prompt = [np.random.default_rng(0).integers(0, cfg.vocab_size, 32).tolist()]
    short, long = 32, 160  # their difference leaves out the reading of the prompt
    counts = {
        str(new): functools.partial(generate, model, prompt, max_new_tokens=new, eos_ids=()) for new in (short, long)
    }
    best = in_turn(counts, repeats)
    per_token = (best[str(long)].wall_ms - best[str(short)].wall_ms) / (long - short)
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - params['embed']['embedding'].nbytes
    kind = jax.devices()[0].device_kind
    chip = next((chip for name, chip in CHIPS.items() if name.upper() in kind), None)
    bound = None if chip is None else 1e3 * read / chip.bandwidth
    row = {'what': 'decoding, 1 row', 'shape': 'Qwen3-8B', 'parameters': count_parameters(params)}
    return {**row, 'ms_per_token': per_token, 'bound_ms': bound}


def main() -> None:
    """Prints a line per shape as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=10)
    parser.add_argument('--tiny', action='store_true')
    parser.add_argument('--json', action='store_true', help='print one JSON object as the last line')
    options = parser.parse_args()
    about = machine()
    print(', '.join(about.values()))
    rows = []
    for name in TRAINING:
        rows.append(row := train(name, options.tiny, options.repeats))
        share = '' if row['mfu'] is None else f', MFU {row["mfu"]:.1%}'
        published = row['published_tokens_per_second']
        beside = f'{published:,} tokens/s, MFU ' if published else 'MFU '
        print(
            f'training  {name:14} {row["parameters"]:14,} parameters  {row["tokens_per_second"]:10,.0f} tokens/s{share}'
            f'  (published: {beside}{row["published_mfu"]:.1%})',
            flush=True,
        )
    rows.append(row := decode(options.tiny, options.repeats))
    bound = '' if row['bound_ms'] is None else f'  (memory bound: {row["bound_ms"]:.2f} ms)'
    print(
        f'decoding  Qwen3-8B       {row["parameters"]:14,} parameters  {row["ms_per_token"]:10.2f} ms per token{bound}'
    )
    if options.json:
        print(json.dumps({'benchmark': 'gpu', 'machine': about, 'rows': rows}))


if __name__ == '__main__':
    main()
