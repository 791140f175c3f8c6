"""Hugging Face model configs to ModelConfig and back; every family has a file here, and a line in the table below.

A field that is neither read nor known to leave the computation alone is an error: a checkpoint is never loaded as
something that it is not. Both dialects are read: `rope_theta` with `rope_scaling`, and the newer `rope_parameters`.
"""

from collections.abc import Mapping
from typing import Any

from jpt.models.config import ModelConfig
from jpt.models.families.bert import BERT
from jpt.models.families.deepseek import DEEPSEEK_V3
from jpt.models.families.family import Family
from jpt.models.families.fields import Fields
from jpt.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from jpt.models.families.gpt2 import GPT2
from jpt.models.families.gpt_oss import GPT_OSS
from jpt.models.families.llama import LLAMA, MISTRAL
from jpt.models.families.llama4 import LLAMA4
from jpt.models.families.mamba2 import MAMBA2
from jpt.models.families.mixtral import MIXTRAL
from jpt.models.families.multimodal import MULTIMODAL, text_part
from jpt.models.families.nemotron_h import NEMOTRON_H
from jpt.models.families.olmo2 import OLMO2
from jpt.models.families.qwen import QWEN2, QWEN3, QWEN3_MOE

FAMILIES: dict[str, Family] = {
    'llama': LLAMA,
    'mistral': MISTRAL,
    'qwen2': QWEN2,
    'qwen3': QWEN3,
    'gemma': GEMMA,
    'gemma2': GEMMA2,
    'gemma3_text': GEMMA3,
    'gpt2': GPT2,
    'bert': BERT,
    'qwen3_moe': QWEN3_MOE,
    'mixtral': MIXTRAL,
    'deepseek_v3': DEEPSEEK_V3,
    'gpt_oss': GPT_OSS,
    'llama4_text': LLAMA4,
    'olmo2': OLMO2,
    'mamba2': MAMBA2,
    'nemotron_h': NEMOTRON_H,
}


# What computes the same under another name; it is written under the first one, which every reader knows.
ALIASES = {'kimi_k2': 'deepseek_v3'}


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json; of a model of several parts, that of its text.

    Raises:
        ValueError: an unsupported model_type, a field that is not known, or a value that jpt does not compute.
    """
    config, _ = text_part(config)
    name = config.get('model_type')
    family = ALIASES.get(str(name), name)
    if family not in FAMILIES:
        known = ', '.join(sorted([*FAMILIES, *ALIASES, *MULTIMODAL]))
        raise ValueError(f'config.json: model_type={name!r}: expected one of {known}')
    fields = Fields(config, family)
    cfg = FAMILIES[family].read(fields)
    fields.check_all_read()
    return cfg


def config_to_hf(cfg: ModelConfig, dtype: str = 'float32') -> dict[str, Any]:
    """The config.json of a model, in a dialect that transformers 4 and 5, vLLM and SGLang read.

    `rope_parameters` with `dtype` is the newer dialect; `rope_theta`, `rope_scaling` and `torch_dtype` say the same to
    older readers.
    """
    family = FAMILIES[cfg.family]
    head = {'architectures': [family.architecture], 'model_type': cfg.family}
    return head | family.write(cfg) | {'torch_dtype': dtype, 'dtype': dtype}
