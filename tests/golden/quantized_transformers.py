"""What transformers' fine-grained FP8 quantizer writes for given weights and tiny models."""

import json
import pathlib
import re
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from quantized_cases import OUT, Tensors, bits_of, weights
from quantized_models import QWEN3, QWEN3_MOE, bfloat16_model, fresh, stored_tensors, write_golden
from safetensors.torch import save_file
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

BLOCKS = ((8, 32), (1, 128))  # each weight is cut by the first that divides it
QUANTIZED_IN_MOE = re.compile(r'experts\.\d+\.\w+\.weight$|[qo]_proj\.weight$')
MOE_KEPT = ['lm_head', 'model.layers.0.mlp.gate', 'k_proj', 'v_proj']


def quantize(weight: torch.Tensor, block: tuple[int, int], scale_fmt: str, name: str = 'x.weight') -> Tensors:
    """Codes and scales under the names of a checkpoint; the weight alone where the block does not divide it."""
    config = FineGrainedFP8Config(weight_block_size=block, scale_fmt=scale_fmt)
    operation: Any = Fp8Quantize(SimpleNamespace(quantization_config=config))
    return operation.convert({name: weight})


def weight_arrays() -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for scale_fmt in ('float', 'ue8m0'):
        for name, dtype, weight in weights():
            for block in BLOCKS:
                quantized = quantize(weight, block, scale_fmt)
                if 'x.weight_scale_inv' in quantized:
                    prefix = f'fp8_block_{block[0]}x{block[1]}_{scale_fmt}/{name}/{dtype}'
                    arrays[f'{prefix}/codes'] = bits_of(quantized['x.weight'])
                    arrays[f'{prefix}/scale'] = bits_of(quantized['x.weight_scale_inv'])
                    break
    return arrays


def write_dense() -> None:
    """The quantizer on a whole model; only its demand for a GPU is waived, for quantizing runs on the CPU, too."""
    directory = fresh('transformers_fp8')
    config = FineGrainedFP8Config(modules_to_not_convert=['lm_head', 'k_proj', 'v_proj'])
    with mock.patch.object(FineGrainedFP8HfQuantizer, 'validate_environment'):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            OUT / QWEN3.name, dtype=torch.bfloat16, quantization_config=config
        )
        model.save_pretrained(directory)
    write_golden(directory, QWEN3, dequantized(directory))


def write_experts() -> None:
    """The quantizer on every matrix of the experts under its published name, as DeepSeek-V3's and Qwen3's files are.

    transformers' own save_pretrained stacks the scales of the experts but not their weights.
    """
    directory = fresh('transformers_fp8_moe')
    model = bfloat16_model(QWEN3_MOE)
    model.save_pretrained(directory)
    tensors: Tensors = {}
    for name, tensor in stored_tensors(directory).items():
        tensors |= quantize(tensor, (128, 128), 'float', name) if QUANTIZED_IN_MOE.search(name) else {name: tensor}
    save_file(tensors, directory / 'model.safetensors', metadata={'format': 'pt'})
    quantization = FineGrainedFP8Config(modules_to_not_convert=MOE_KEPT).to_dict()
    config = json.loads((directory / 'config.json').read_text()) | {'quantization_config': quantization}
    (directory / 'config.json').write_text(json.dumps(config, indent=2, sort_keys=True) + '\n')
    write_golden(directory, QWEN3_MOE, dequantized(directory))


def dequantized(directory: pathlib.Path) -> Tensors:
    """The float32 weights that transformers loads from the files, with no key missing and none unexpected."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        quantization_config=FineGrainedFP8Config(dequantize=True),
        output_loading_info=True,
    )
    model, report = loaded
    assert not report['missing_keys'], report
    assert not report['unexpected_keys'], report
    weights = model.state_dict()
    # What is not quantized keeps the file's bfloat16; what is has not been rounded to it.
    assert weights['model.layers.0.self_attn.q_proj.weight'].dtype == torch.float32
    return {name: weight.float() for name, weight in weights.items()}


def checkpoints() -> None:
    write_dense()
    write_experts()
