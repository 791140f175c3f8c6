"""What llm-compressor and compressed-tensors write for given weights and tiny models."""

import numpy as np
import torch
from compressed_tensors.compressors.base import BaseCompressor, compress_module
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
    initialize_module_for_quantization,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.quantization.calibration import (
    freeze_module_quantization,
    initialize_observer,
    observe,
    update_qparams,
)
from make_models import logits_of
from quantized_cases import Tensors, bits_of, weights
from quantized_models import (
    LLAMA,
    QWEN3,
    T,
    float32_model,
    fresh,
    loaded_source,
    stored_tensors,
    tokens_of,
    write_golden,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from variant import Variant

RENAMED = {
    'weight': 'codes',
    'weight_packed': 'codes',
    'weight_scale': 'scale',
    'weight_global_scale': 'global_scale',
}
KINDS = ('weight', 'bias', 'weight_packed', 'weight_scale', 'weight_global_scale', 'weight_shape')
# Format: the scheme's name, and the number that must divide the weight's input width.
FORMATS = {
    'fp8_channel': ('FP8_DYNAMIC', 1),
    'fp8_block_128x128': ('FP8_BLOCK', 1),
    'int4_group_128': ('W4A16', 128),
    'nvfp4': ('NVFP4A16', 16),
}


def compress(weight: torch.Tensor, scheme: str) -> Tensors:
    """The tensors of one linear layer with this weight after round-to-nearest quantization and compression."""
    rows, columns = weight.shape
    layer = torch.nn.Linear(columns, rows, bias=False, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    initialize_module_for_quantization(layer, preset_name_to_scheme(scheme, ['Linear']))
    initialize_observer(layer, 'weight')
    observe(layer, 'weight')
    update_qparams(layer, 'weight')
    freeze_module_quantization(layer)
    compress_module(layer)
    return layer.state_dict()


def weight_arrays() -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for form, (scheme, divisor) in FORMATS.items():
        for name, dtype, weight in weights():
            if weight.shape[1] % divisor or (name == 'ragged' and form != 'fp8_block_128x128'):
                continue
            compressed = compress(weight, scheme)
            arrays |= {
                f'{form}/{name}/{dtype}/{RENAMED[key]}': bits_of(value)
                for key, value in compressed.items()
                if key in RENAMED
            }
    return arrays


CHECKPOINTS = {
    'compressed_fp8_dynamic': (LLAMA, 'FP8_DYNAMIC'),
    'compressed_nvfp4a16': (LLAMA, 'NVFP4A16'),
    'compressed_fp8_block': (QWEN3, 'FP8_BLOCK'),
    'compressed_w4a16': (QWEN3, 'W4A16'),
    'compressed_fp8_kv': (LLAMA, 'FP8_DYNAMIC'),
}
KV = {'num_bits': 8, 'type': 'float', 'strategy': 'tensor', 'dynamic': False, 'symmetric': True}


def dequantized(tensors: Tensors, scheme: QuantizationScheme) -> Tensors:
    """The float32 weights that the stored tensors mean, by the library's own functions, from scales in float32."""
    out: Tensors = {}
    for layer in {name.rpartition('.')[0] for name in tensors}:
        if layer.endswith('.self_attn'):  # k_scale and v_scale
            continue
        local = {kind: tensors[f'{layer}.{kind}'] for kind in KINDS if f'{layer}.{kind}' in tensors}
        if 'weight_scale' not in local:
            out |= {f'{layer}.{kind}': tensor.float() for kind, tensor in local.items()}
            continue
        if local['weight_scale'].dtype == torch.bfloat16:
            local['weight_scale'] = local['weight_scale'].float()
        out[f'{layer}.weight'] = dequantized_weight(local, scheme)
    return out


def dequantized_weight(local: Tensors, scheme: QuantizationScheme) -> torch.Tensor:
    """float32 [out, in]."""
    if 'weight_global_scale' not in local:
        decompressor = BaseCompressor.get_value_from_registry(scheme.format.value)
        return decompressor.decompress(local, scheme)['weight']
    # The two steps of the decompressor, which would round the product to bfloat16.
    rows, width = local['weight_packed'].shape
    codes = unpack_fp4_from_uint8(local['weight_packed'], rows, 2 * width, dtype=torch.float32)
    scale, global_scale = local['weight_scale'].float(), local['weight_global_scale']
    return dequantize(codes, scale, args=scheme.weights, dtype=torch.float32, global_scale=global_scale)


def logits_with_activations(
    variant: Variant, weights: Tensors, scheme: QuantizationScheme, cache: Tensors
) -> np.ndarray:
    """Of the float32 model with the library's own dynamic quantization of every input that the scheme asks for.

    `cache` has the scales of keys and values, where these are quantized too.
    """
    model = float32_model(variant, weights)
    inputs_only = QuantizationScheme(targets=['Linear'], input_activations=scheme.input_activations)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != 'lm_head':
            initialize_module_for_quantization(module, inputs_only)
            module.quantization_status = QuantizationStatus.FROZEN
    if cache:
        apply_quantization_config(
            model, QuantizationConfig(config_groups={}, kv_cache_scheme=KV, quantization_status='frozen')
        )
        found = model.load_state_dict({name: scale.float() for name, scale in cache.items()}, strict=False)
        assert not found.unexpected_keys, found.unexpected_keys
    return logits_of(model, tokens_of(variant))


def checkpoints() -> None:
    for name, (variant, preset) in CHECKPOINTS.items():
        model, directory = loaded_source(variant), fresh(name)
        given = {'targets': 'Linear', 'scheme': preset, 'ignore': ['lm_head']}
        more: dict[str, np.ndarray] = {}
        if name.endswith('kv'):
            more['calibration'] = tokens_of(variant, rows=4, seed=' calibration').astype(np.int32)
            rows = {'input_ids': more['calibration'].tolist(), 'attention_mask': np.ones((4, T), int).tolist()}
            modifier = QuantizationModifier(**given, kv_cache_scheme=KV)
            # A tokenizer is asked for, though the rows are numbers.
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({'?': 0}, unk_token='?')))
            oneshot(
                model=model,
                dataset=Dataset.from_dict(rows),
                num_calibration_samples=4,
                recipe=modifier,
                processor=tokenizer,
                pipeline='basic',
                shuffle_calibration_samples=False,
            )
        else:
            oneshot(model=model, recipe=QuantizationModifier(**given))
        scheme = model.model.layers[0].self_attn.q_proj.quantization_scheme
        model.save_pretrained(directory, save_compressed=True)
        stored = stored_tensors(directory)
        weights = dequantized(stored, scheme)
        cache = {key: scale for key, scale in stored.items() if key.endswith(('.k_scale', '.v_scale'))}
        if scheme.input_activations is not None:
            more['logits_activations'] = logits_with_activations(variant, weights, scheme, cache)
        write_golden(directory, variant, weights, **more)
