"""Training and decoding on CPU, beside transformers on the same cores in the same run.

    python benchmarks/cpu.py [--repeats=5] [--json]

The quickstart's teacher and student shapes, float32, AdamW with clipping, batches of 8 x 256 tokens, one text per row.
The peer is transformers' LlamaForCausalLM with torch's fused AdamW (pip install -r benchmarks/requirements.txt). Both
take turns; the best step of each counts. Decoding is benchmarks/decode.py at batch 4.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from decode import measure, shapes
from jobs import random_job, step_of, tokens
from timing import in_turn, machine

ROWS, LENGTH = 8, 256


def peer_step(shape: dict[str, Any]) -> Callable[[], Any] | None:
    """The same step in transformers; None where it is not installed."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    torch.manual_seed(0)
    network: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).train()
    decayed = [p for p in network.parameters() if p.ndim > 1]
    plain = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{'params': decayed, 'weight_decay': 0.1}, {'params': plain, 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    ids = torch.from_numpy(tokens(shape['vocab_size'], ROWS, LENGTH)[:, :-1].astype(np.int64))

    def run() -> Any:
        loss = network(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--json', action='store_true', help='print one JSON object as the last line')
    options = parser.parse_args()
    about = machine()
    print(', '.join(about.values()))
    print(f'{"":10}{"":12}{"jpt tok/s":>12}{"transformers":>14}{"ratio":>8}')
    rows: list[dict[str, Any]] = []
    for name, shape in shapes().items():
        # Layers unrolled as in the quickstart's configs.
        job, batch = random_job(shape, ROWS, LENGTH, compute={'unroll': shape['num_hidden_layers']})
        runs = {'jpt': step_of(job, batch)}
        peer = peer_step(shape)
        if peer is not None:
            runs['transformers'] = peer
        rates = {key: 1e3 * ROWS * LENGTH / best.wall_ms for key, best in in_turn(runs, options.repeats).items()}
        rows.append({'what': 'training', 'shape': name, **rates})
        rows.append({'what': 'decoding', **measure(name, shape, 4, 32, 128, options.repeats)})
    for row in rows:
        other = row.get('transformers')
        shown = f'{other:14,.0f}{row["jpt"] / other:8.2f}' if other else f'{"-":>14}{"-":>8}'
        print(f'{row["shape"]:10}{row["what"]:12}{row["jpt"]:12,.0f}{shown}')
    if options.json:
        print(json.dumps({'benchmark': 'cpu', 'machine': about, 'rows': rows}))


if __name__ == '__main__':
    main()
