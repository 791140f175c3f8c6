"""Writes tests/golden/mxfp4/gpt_oss/: a tiny gpt-oss whose experts are stored in MXFP4, as the published files are.

Run by hand where torch (CPU) and transformers 5.x are installed:

    python tests/golden/make_mxfp4.py

The blocks hold every byte, the scales a range of exponents; the logits are those of the model that transformers
dequantizes from the files that are written here.
"""

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import torch
import transformers
from make_models import build, logits_of, randomise, seed_of, tokens_of
from moe_variants import GPT_OSS
from routing import LEAST_GAP, least_gap, routings_of
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.utils.quantization_config import Mxfp4Config
from variant import Variant

OUT = pathlib.Path(__file__).parent / 'mxfp4' / 'gpt_oss'
PACKED = ('gate_up_proj', 'down_proj')
VARIANT = Variant(
    'mxfp4_gpt_oss',
    'GptOssForCausalLM',
    {**GPT_OSS, 'hidden_size': 64, 'intermediate_size': 32, 'vocab_size': 79, 'swiglu_limit': 7.0},
)
QUANTIZATION = {
    'quant_method': 'mxfp4',
    'modules_to_not_convert': [
        *('model.layers.*.self_attn', 'model.layers.*.mlp.router'),
        *('model.embed_tokens', 'lm_head'),
    ],
}


def pack(model: Any, attempt: int) -> dict[str, torch.Tensor]:
    """Random blocks and scales for every expert matrix; the model gets what they mean. Returns them by stored name."""
    random = np.random.default_rng(seed_of(VARIANT.name, attempt))
    packed: dict[str, torch.Tensor] = {}
    for name, weight in model.named_parameters():
        if name.endswith(PACKED):
            experts, inputs, outputs = weight.shape
            shape = (experts, outputs, inputs // 32)
            blocks = torch.from_numpy(random.integers(0, 256, (*shape, 16), dtype=np.uint8))
            # Values of up to 6 times 2^(scale - 127).
            scales = torch.from_numpy(random.integers(118, 125, shape, dtype=np.uint8))
            with torch.no_grad():
                weight.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
            packed |= {f'{name}_blocks': blocks, f'{name}_scales': scales}
    return packed


def main() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    shutil.rmtree(OUT, ignore_errors=True)
    tokens = tokens_of(VARIANT)
    for attempt in range(300):
        model = build(VARIANT)
        randomise(VARIANT, model, attempt)
        packed = pack(model, attempt)
        routings = routings_of(model, tokens)
        if least_gap(routings) > LEAST_GAP and all(routing.uses_every_expert for routing in routings):
            break
    else:
        raise RuntimeError('every choice of weights brings some token near a tie between experts')
    logits = logits_of(model, tokens)

    model.save_pretrained(OUT)
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(PACKED)}
    save_file(kept | packed, OUT / 'model.safetensors', metadata={'format': 'pt'})
    config = json.loads((OUT / 'config.json').read_text()) | {'quantization_config': QUANTIZATION}
    (OUT / 'config.json').write_text(json.dumps(config, indent=2, sort_keys=True) + '\n')
    dense = {name: tensor.numpy() for name, tensor in model.state_dict().items() if name.endswith(PACKED)}
    np.savez_compressed(OUT / 'golden.npz', tokens=tokens.astype(np.int32), logits=logits, **dense)

    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        OUT,
        quantization_config=Mxfp4Config(dequantize=True),
        attn_implementation='eager',
        experts_implementation='eager',
        dtype=torch.float32,
    )
    for name, values in dense.items():
        np.testing.assert_array_equal(loaded.state_dict()[name].float().numpy(), values, err_msg=name)
    np.testing.assert_array_equal(logits_of(loaded.float().eval(), tokens), logits)
    size = sum(path.stat().st_size for path in OUT.iterdir())
    print(f'{size} bytes, largest logit {np.abs(logits).max():.2f}, gap {least_gap(routings):.1e}')


if __name__ == '__main__':
    main()
