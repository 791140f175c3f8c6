"""Writes tests/golden/sampling.npz: what transformers' logits processors make of given logits.

    python tests/golden/make_sampling.py

The processors are those that `generate` builds from a generation config, in its own order: repetition penalty, then
temperature, top-k, top-p, min-p. Arrays: logits [B, V], context [B, T] (the ids seen so far), `settings` (JSON, one
entry per case) and `scores` [case, B, V]; a token that may not be drawn has -inf.
"""

import json
import pathlib
from typing import Any

import numpy as np
import torch
import transformers

OUT = pathlib.Path(__file__).parent / 'sampling.npz'
B, V, T = 4, 53, 9
SETTINGS: tuple[dict[str, float | int], ...] = (
    {'temperature': 0.7},
    {'temperature': 1.6},
    {'top_k': 1},
    {'top_k': 7},
    {'top_k': 1000},
    {'top_p': 0.5},
    {'top_p': 0.9},
    {'top_p': 1e-6},
    {'min_p': 0.1},
    {'min_p': 0.9},
    {'repetition_penalty': 1.3},
    {'repetition_penalty': 0.8},
    {'temperature': 0.8, 'top_k': 20, 'top_p': 0.9},
    {'temperature': 1.5, 'top_p': 0.8, 'min_p': 0.05},
    {'repetition_penalty': 1.2, 'temperature': 0.6, 'top_k': 12, 'top_p': 0.95, 'min_p': 0.02},
)


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Logits without ties at the cuts, one row nearly flat and one nearly certain, and contexts that repeat ids."""
    random = np.random.default_rng(20)
    logits = random.normal(0, 2.5, (B, V)).astype(np.float32)
    logits[1] *= 0.05
    logits[2, 17] += 12.0
    context = random.integers(0, V, (B, T))
    context[:, 5:7] = context[:, 1:3]
    context[2, 0] = 17
    return logits, context


def processed(setting: dict[str, float | int], logits: np.ndarray, context: np.ndarray) -> np.ndarray:
    """The scores from which `generate(do_sample=True)` draws."""
    config = transformers.GenerationConfig(do_sample=True, **{'top_k': 0, **setting})
    tiny = transformers.LlamaConfig(
        vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model: Any = transformers.LlamaForCausalLM(tiny)
    processors: Any = model._get_logits_processor(
        generation_config=config, input_ids_seq_length=T, logits_processor=transformers.LogitsProcessorList()
    )
    return processors(torch.from_numpy(context), torch.from_numpy(logits.copy())).numpy()


def main() -> None:
    logits, context = inputs()
    scores = np.stack([processed(setting, logits, context) for setting in SETTINGS])
    np.savez_compressed(
        OUT, logits=logits, context=context.astype(np.int32), settings=np.array(json.dumps(SETTINGS)), scores=scores
    )
    for setting, case in zip(SETTINGS, scores, strict=True):
        print(setting, 'kept per row:', np.isfinite(case).sum(axis=-1).tolist())


if __name__ == '__main__':
    main()
