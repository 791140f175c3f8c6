"""Decoding tokens per second of the quickstart's shapes, beside transformers' `generate` where it is installed.

    python benchmarks/decode.py [--batch=1,4,16] [--prompt=32] [--new=128] [--json]

Random weights, float32, greedy, no end token: every row gets all its tokens. A run is one `generate` call with the
reading of the prompts; the first call, which compiles, is not counted; the best of --repeats counts, as the machine
allows it. Both libraries take turns, so that what else the machine does meets both.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from timing import in_turn, machine

import jpt
from jpt.generation.engine import generate
from jpt.models.families import config_from_hf
from jpt.models.shapes import QUICKSTART_STUDENT, QUICKSTART_TEACHER
from jpt.models.transformer import init

LENGTH = 1024


def shapes() -> dict[str, dict[str, Any]]:
    """The config.json of the quickstart's teacher and student, with room for longer texts."""
    found = {'teacher': QUICKSTART_TEACHER, 'student': QUICKSTART_STUDENT}
    return {name: {**shape, 'max_position_embeddings': LENGTH} for name, shape in found.items()}


def model_of(shape: dict[str, Any]) -> jpt.Model:
    """A model of this shape with random weights."""
    cfg = config_from_hf(shape)
    return jpt.Model(cfg, init(cfg, jax.random.key(0)))


def peer_of(shape: dict[str, Any], new: int) -> Callable[[np.ndarray], Any] | None:
    """transformers' greedy generate for the same shape; None where it is not installed."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    torch.manual_seed(0)
    network: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    settings: dict[str, Any] = {'do_sample': False, 'max_new_tokens': new, 'min_new_tokens': new, 'pad_token_id': 0}

    def run(prompts: np.ndarray) -> Any:
        with torch.inference_mode():
            return network.generate(torch.from_numpy(prompts), attention_mask=torch.ones(prompts.shape), **settings)

    return run


def measure(name: str, shape: dict[str, Any], batch: int, prompt: int, new: int, repeats: int) -> dict[str, Any]:
    """One line of the table."""
    model = model_of(shape)
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, prompt))
    ids = prompts.tolist()
    runs: dict[str, Callable[[], Any]] = {
        'jpt': lambda: generate(model, ids, max_new_tokens=new, eos_ids=(), batch_size=batch)
    }
    peer = peer_of(shape, new)
    if peer is not None:
        runs['transformers'] = lambda: peer(prompts)
    rates = {key: 1e3 * batch * new / best.wall_ms for key, best in in_turn(runs, repeats).items()}
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    return {'shape': name, 'parameters': count, 'batch': batch, **rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shapes', default='teacher,student')
    parser.add_argument('--batch', default='1,4,16')
    parser.add_argument('--prompt', type=int, default=32)
    parser.add_argument('--new', type=int, default=128)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--json', action='store_true', help='print one JSON object as the last line')
    options = parser.parse_args()
    about = machine()
    print(f'{", ".join(about.values())}; prompts of {options.prompt} tokens, {options.new} new ones, float32')
    print(f'{"shape":10}{"parameters":>12}{"batch":>7}{"jpt tok/s":>12}{"transformers":>14}{"ratio":>8}')
    rows = []
    known = shapes()
    for shape in options.shapes.split(','):
        for batch in map(int, options.batch.split(',')):
            row = measure(shape, known[shape], batch, options.prompt, options.new, options.repeats)
            rows.append(row)
            peer = row.get('transformers')
            ratio = f'{row["jpt"] / peer:8.2f}' if peer else '       -'
            shown = f'{peer:14,.0f}' if peer else f'{"-":>14}'
            print(f'{shape:10}{row["parameters"]:12,}{batch:7}{row["jpt"]:12,.0f}{shown}{ratio}', flush=True)
    if options.json:
        print(json.dumps({'benchmark': 'decode', 'machine': about, 'rows': rows}))


if __name__ == '__main__':
    main()
