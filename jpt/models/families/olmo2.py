"""OLMo 2: Llama with norms after attention and MLP, and with queries and keys normed over all their heads."""

import dataclasses
from typing import Any

from jpt.models.config import ModelConfig
from jpt.models.families.family import Family
from jpt.models.families.fields import Fields
from jpt.models.families.llama import LLAMA_DIALECT, llama_like, write_llama_like

OLMO2_DIALECT = dataclasses.replace(
    LLAMA_DIALECT,
    layer={
        **LLAMA_DIALECT.layer,  # its norms before attention and MLP are not in the model, and their names unused
        'attn_post_norm': 'post_attention_layernorm',
        'mlp_post_norm': 'post_feedforward_layernorm',
    },
)


def _read(fields: Fields) -> ModelConfig:
    bias = fields.boolean('attention_bias', False)
    return llama_like(
        fields,
        pre_norms=False,
        post_norms=True,
        qk_norm=True,
        qk_norm_over_heads=True,
        qkv_bias=bias,
        attention_out_bias=bias,
        norm_eps=fields.number('rms_norm_eps', 1e-5),
    )


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return write_llama_like(cfg) | {'attention_bias': cfg.qkv_bias}


OLMO2 = Family('Olmo2ForCausalLM', _read, _write, OLMO2_DIALECT)
