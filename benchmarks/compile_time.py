"""How long a training step takes to trace and compile, by what its layers repeat.

    python benchmarks/compile_time.py [--json]

A hybrid in the pattern of Nemotron-H-8B, whose 52 layers are a period of eleven, four times, and one of two, four
times; a period of it alone; both periods once; and all 52 layers as if nothing repeated (the peer). Widths are tiny: a
program's size, not its arrays', takes the time. Forward, backward and optimizer, float32, on this machine's CPU.
"""

import argparse
import dataclasses
import json
import time
from typing import Any

import jax
from jobs import random_job
from timing import machine

import jpt.models.families.nemotron_h as nemotron_h
from jpt.models.config import LayerKind, Segment

PATTERN = 'M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-'


def shape(pattern: str) -> dict[str, Any]:
    """A config.json of a tiny Nemotron-H with these layers."""
    return {
        'model_type': 'nemotron_h',
        'vocab_size': 64,
        'hidden_size': 32,
        'hybrid_override_pattern': pattern,
        'num_hidden_layers': len(pattern),
        'num_attention_heads': 4,
        'num_key_value_heads': 2,
        'head_dim': 8,
        'intermediate_size': 64,
        'mamba_num_heads': 4,
        'mamba_head_dim': 8,
        'n_groups': 2,
        'ssm_state_size': 16,
    }


def apart(kinds: tuple[LayerKind, ...]) -> tuple[Segment, ...]:
    """Every layer a segment of its own."""
    return tuple(Segment((kind,), 1) for kind in kinds)


def measured(pattern: str) -> dict[str, float]:
    """Seconds to trace and to compile a step of a model with these layers."""
    jax.clear_caches()
    job, _ = random_job(shape(pattern), 2, 64)
    start = time.perf_counter()
    lowered = job.step.lower(job.state, job.batch)
    traced = time.perf_counter()
    lowered.compile()
    return {'trace_s': traced - start, 'compile_s': time.perf_counter() - traced}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--json', action='store_true', help='print one JSON object as the last line')
    options = parser.parse_args()
    jax.config.update('jax_enable_compilation_cache', False)
    about = machine()
    print(', '.join(about.values()))
    print(f'{"":34}{"layers":>8}{"traced":>8}{"trace":>9}{"compile":>9}')
    rows: list[dict[str, Any]] = []
    cases = {
        'its period of eleven': PATTERN[:11],
        'both periods, once each': PATTERN[:11] + PATTERN[44:46],
        'the whole hybrid': PATTERN,
    }
    scanned = nemotron_h.runs_of
    for name, pattern, segments in [
        *((name, pattern, scanned) for name, pattern in cases.items()),
        ('the whole hybrid, layer by layer', PATTERN, apart),
    ]:
        nemotron_h.runs_of = segments
        kinds = len(pattern) if segments is apart else sum(len(s.kinds) for s in segments(_kinds(pattern)))
        row = {'what': name, 'layers': len(pattern), 'traced': kinds, **measured(pattern)}
        rows.append(row)
        print(f'{name:34}{row["layers"]:8}{row["traced"]:8}{row["trace_s"]:8.1f}s{row["compile_s"]:8.1f}s', flush=True)
    nemotron_h.runs_of = scanned
    if options.json:
        print(json.dumps({'benchmark': 'compile_time', 'machine': about, 'rows': rows}))


def _kinds(pattern: str) -> tuple[LayerKind, ...]:
    return tuple(dataclasses.replace(LayerKind(), mlp_width=ord(letter)) for letter in pattern)


if __name__ == '__main__':
    main()
