"""Whether a student of 4B parameters and 248,320 words learns from rows of 32,768 tokens on one 80 GB GPU.

    python benchmarks/long_rows.py [--json]

Compiled ahead of time for one H100 (extra `aot`), no GPU needed: one row per step, 64 recorded words per token, weights
in bfloat16, full rematerialization, no context parallelism; all weights with moments in bfloat16, and LoRA. Bytes of a
device by part, in GiB.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jpt.config import config_dict, from_config_dict
from jpt.data.target_codec import PieceTargets, encode_targets
from jpt.data.target_store import Manifest, Piece, hash_of, part_path, write_manifest, write_part
from jpt.kernels.sparse_target import SparseTarget
from jpt.plan import fits
from jpt.planned import Planned, plan_step
from jpt.sharding.topology import H100, topology_devices
from jpt.training.settings import TrainConfig

WORDS, LIKELY, LENGTH = 248320, 64, 32768
ARCHITECTURE = {
    'model_type': 'qwen3',
    'vocab_size': WORDS,
    'hidden_size': 2560,
    'intermediate_size': 9728,
    'num_hidden_layers': 36,
    'num_attention_heads': 32,
    'num_key_value_heads': 8,
    'head_dim': 128,
    'max_position_embeddings': LENGTH,
    'rms_norm_eps': 1e-6,
    'rope_theta': 1000000.0,
    'tie_word_embeddings': True,
}
WAYS: dict[str, dict[str, Any]] = {
    'all weights': {'optimizer': {'moments': 'bfloat16'}},
    'LoRA': {'lora': {'rank': 16, 'targets': ('layers/**/attn/{q,k,v,out}', 'layers/**/mlp/{gate,up,down}')}},
}


def recorded(folder: Path) -> Path:
    """What a teacher said of one word of one text: enough for a step to be compiled."""
    ids = np.array([1, 2], np.int32)
    words = np.arange(LIKELY, dtype=np.int32)[None]
    target = SparseTarget(words, np.full((1, LIKELY), -5, np.float32), np.full(1, -1, np.float32))
    data = encode_targets(PieceTargets(target, np.full(1, -5, np.float32)), 'bfloat16', WORDS)
    path = part_path(folder, 'train', 0)
    write_part(path, [Piece(hash_of(ids), hash_of(ids), 0, 1, 0, 0, 0, data)], {'next': {}, 'sums': {}})
    parts = {'train': {'parts': [{'file': path.name, 'bytes': path.stat().st_size}], 'sums': {}}}
    about = {'path': 'teacher', 'family': 'qwen3', 'fingerprint': '', 'dtype': 'bfloat16'}
    write_manifest(folder, Manifest(about, '', WORDS, 1.0, LIKELY, None, 1, 'bfloat16', 2**-8, LENGTH, {}, parts))
    return folder


def planned(way: str) -> Planned:
    """A step compiled for one H100."""
    with tempfile.TemporaryDirectory() as folder:
        values = {
            'task': 'distill',
            'model': {'architecture': ARCHITECTURE},
            'distill': {'targets': str(recorded(Path(folder)))},
            'data': {'paths': ('train.jsonl',)},
            'batch': {'size': 1, 'length': LENGTH},
            'compute': {'dtype': 'bfloat16', 'param_dtype': 'bfloat16', 'remat': 'full'},
        }
        config = from_config_dict(TrainConfig, config_dict(TrainConfig, values | WAYS[way]), 'config')
        return plan_step(config, topology_devices(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--json', action='store_true')
    args = parser.parse_args()
    jax.config.update('jax_platforms', 'cpu')
    names = ('params', 'optimizer', 'frozen', 'batch', 'gradients', 'rest')
    print(f'| trained | {" | ".join(names)} | in all | fits |')
    print(f'| --- | {" | ".join("---:" for _ in names)} | ---: | --- |')
    found = {}
    for way in WAYS:
        plan = planned(way)
        found[way] = {**plan.parts, 'total': plan.total, 'fits': fits(plan, H100)}
        sizes = [f'{plan.parts.get(name, 0) / 2**30:.2f}' for name in names]
        print(f'| {way} | {" | ".join(sizes)} | {plan.total / 2**30:.2f} | {"yes" if fits(plan, H100) else "no"} |')
    if args.json:
        print(json.dumps({'benchmark': 'long_rows', 'jax': jax.__version__, 'results': found}))


if __name__ == '__main__':
    main()
