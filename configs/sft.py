"""Supervised tuning of a checkpoint on conversations: all weights, or LoRA adapters.

    python -m jpt.train --config=configs/sft.py:path/to/model --config.data.paths=chat.jsonl
    python -m jpt.train --config=configs/sft.py:path/to/model,lora --config.data.paths=chat.jsonl

The model is a Hugging Face directory, a jpt checkpoint or 'quickstart', the small teacher that jpt ships; its tokenizer
must have a chat template. A line of the data is {"messages": [...]} as OpenAI writes it; for questions and answers name
their keys: --config.data.prompt_key=question --config.data.completion_key=answer. Held-out conversations:
--config.eval.data.paths=held_out.jsonl (and --config.eval.data.prompt_key=...). On GPUs add
--config.compute.dtype=bfloat16, and --config.compute.remat=full where memory is short. See docs/train.md.
"""

from ml_collections import ConfigDict

from jpt.config import config_dict
from jpt.training.settings import TrainConfig

# What does not fit into a row is left out and counted; by default it would be an error with its line.
CHAT = {'kind': 'chat', 'long_documents': 'drop'}
ADAPTERS = {'targets': ('layers/**/attn/{q,k,v,out}', 'layers/**/mlp/{gate,up,down}'), 'rank': 16, 'alpha': 32.0}


def get_config(options: str = 'quickstart') -> ConfigDict:
    """Settings of the run: 'MODEL', or 'MODEL,lora'."""
    model, _, adapters = options.partition(',')
    if adapters not in ('', 'lora'):
        raise ValueError(f"configs/sft.py:{options}: expected MODEL or MODEL,lora, found '{adapters}' after the comma")
    return config_dict(
        TrainConfig,
        {
            'task': 'sft',
            'model': {'path': model},
            'lora': ADAPTERS if adapters else None,
            'data': CHAT | {'paths': ('chat.jsonl',)},
            'eval': {'data': CHAT, 'every': 100},
            'batch': {'size': 8, 'length': 1024},
            'steps': 300,
            'schedule': {'kind': 'cosine', 'lr': 2e-4 if adapters else 2e-5, 'warmup': 10},
            'checkpoint': {'every': 100},
        },
    )
