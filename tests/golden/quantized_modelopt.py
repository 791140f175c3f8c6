"""What ModelOpt's export writes for given weights and tiny models."""

import copy
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from make_models import logits_of
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.export.unified_export_hf import _export_quantized_weight
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
from quantized_cases import Tensors, bits_of, weights
from quantized_models import LLAMA, QWEN3, fresh, loaded_source, stored_tensors, tokens_of, write_golden
from variant import Variant

RENAMED = {'weight': 'codes', 'weight_scale': 'scale', 'weight_scale_2': 'scale_2'}
# Format: the configuration of ModelOpt, and the numbers that must divide the weight's [out, in].
FORMATS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    'fp8_tensor': (mtq.FP8_DEFAULT_CFG, (1, 1)),
    'fp8_channel': (mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG, (1, 1)),
    'fp8_block_128x128': (mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG, (1, 1)),
    'int8_channel': (mtq.INT8_WEIGHT_ONLY_CFG, (1, 1)),
    'mxfp8': (mtq.MXFP8_DEFAULT_CFG, (1, 32)),
    'mxfp4': (mtq.MXFP4_DEFAULT_CFG, (1, 32)),
    'nvfp4': (mtq.W4A16_NVFP4_CFG, (1, 16)),
    'int4_group_128': (mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, (2, 128)),
    'w4a8': (mtq.W4A8_AWQ_BETA_CFG | {'algorithm': 'max'}, (2, 128)),
}


def export(weight: torch.Tensor, config: dict[str, Any]) -> Tensors:
    """The tensors of one linear layer with this weight after quantization and export."""
    rows, columns = weight.shape
    layer = torch.nn.Linear(columns, rows, bias=False, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    model: Any = torch.nn.Sequential(layer)
    ones = torch.ones(1, columns, dtype=weight.dtype)  # for the scale of inputs, which is not kept
    static = config is FORMATS['w4a8'][0]
    mtq.quantize(model, copy.deepcopy(config), forward_loop=(lambda model: model(ones)) if static else None)
    _export_quantized_weight(model[0], weight.dtype)
    return {name: tensor for name, tensor in model[0].state_dict().items() if name in RENAMED}


def weight_arrays() -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for form, (config, divisors) in FORMATS.items():
        for name, dtype, weight in weights():
            if any(size % divisor for size, divisor in zip(weight.shape, divisors, strict=True)):
                continue
            if name == 'ragged' and form != 'fp8_block_128x128':
                continue
            try:
                exported = export(weight, config)
            except (AssertionError, IndexError, RuntimeError) as error:
                print(f'{form}/{name}/{dtype} is not exported: {type(error).__name__}: {error}')
                continue
            arrays |= {f'{form}/{name}/{dtype}/{RENAMED[key]}': bits_of(value) for key, value in exported.items()}
    return arrays


# What the recipes that end in kv_fp8_cast say of keys and values, here of nothing else.
KV_CAST = {
    'quant_cfg': [
        {'quantizer_name': '*', 'enable': False},
        {'quantizer_name': '*[kv]_bmm_quantizer', 'cfg': {'num_bits': (4, 3), 'use_constant_amax': True}},
    ],
    'algorithm': 'max',
}
FP8_KV = {'quant_cfg': mtq.FP8_DEFAULT_CFG['quant_cfg'] + mtq.FP8_KV_CFG['quant_cfg'], 'algorithm': 'max'}
CHECKPOINTS: dict[str, tuple[Variant, dict[str, Any]]] = {
    'modelopt_fp8_kv': (LLAMA, FP8_KV),
    'modelopt_kv_cast': (LLAMA, KV_CAST),
    'modelopt_nvfp4': (LLAMA, mtq.NVFP4_DEFAULT_CFG),
    'modelopt_fp8_block': (QWEN3, mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG),
    'modelopt_int4_awq': (QWEN3, mtq.INT4_AWQ_CFG),
    'modelopt_w4a8_awq': (QWEN3, mtq.W4A8_AWQ_BETA_CFG),
}


def dequantized(tensors: Tensors) -> Tensors:
    """The float32 weights that the exported tensors mean; scales of inputs and caches are left out."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition('.')
        if kind in ('weight_scale', 'weight_scale_2', 'input_scale', 'k_scale', 'v_scale', 'pre_quant_scale'):
            continue
        out[name] = dequantized_weight(tensor, tensors, layer) if f'{layer}.weight_scale' in tensors else tensor.float()
    return out


def dequantized_weight(codes: torch.Tensor, tensors: Tensors, layer: str) -> torch.Tensor:
    """float32 [out, in], by ModelOpt's own tensor classes where these know the exported layout."""
    scale, scale_2 = tensors[f'{layer}.weight_scale'], tensors.get(f'{layer}.weight_scale_2')
    if scale_2 is not None and scale.dtype == torch.float8_e4m3fn:
        shape = torch.Size((codes.shape[0], 2 * codes.shape[1]))
        quantized = NVFP4QTensor(shape, torch.float32, codes)
        return quantized.dequantize(torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
    if codes.dtype == torch.float8_e4m3fn and scale.dim() == 0:
        return FP8QTensor(codes.shape, torch.float32, codes).dequantize(torch.float32, scale=scale)
    if codes.dtype == torch.float8_e4m3fn:
        blocks = {-1: 128, -2: 128}
        scale = scale.reshape(-(-codes.shape[0] // 128), -(-codes.shape[1] // 128))
        return FP8QTensor(codes.shape, torch.float32, codes).dequantize(torch.float32, scale=scale, block_sizes=blocks)
    # ModelOpt has no reader of the rows that its INT4 export packs two by two: low nibble first, two's complement.
    pairs = torch.stack([codes << 4, codes & 0xF0], 1).view(torch.int8) >> 4
    weight = pairs.reshape(-1, codes.shape[1]).float() * scale.float().repeat_interleave(128, 1)
    if scale_2 is not None:  # W4A8: multiplied in eight bits
        eight, _ = FP8QTensor.quantize(weight, scale_2)
        weight = eight.dequantize(torch.float32, scale=scale_2)
    before = tensors.get(f'{layer}.pre_quant_scale')
    return weight if before is None else weight * before.float()


def logits_with_activations(model: Any, weights: Tensors, variant: Variant) -> np.ndarray:
    """Of the calibrated model that has not been exported: its input and cache quantizers over the exported weights."""
    model = model.float()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert all('quantizer' in name for name in missing), missing
    mtq.disable_quantizer(model, '*weight_quantizer')
    return logits_of(model, tokens_of(variant))


def checkpoints() -> None:
    for name, (variant, config) in CHECKPOINTS.items():
        model, directory = loaded_source(variant), fresh(name)
        calibration = tokens_of(variant, rows=4, seed=' calibration')
        mtq.quantize(model, copy.deepcopy(config), lambda model, ids=calibration: model(torch.from_numpy(ids)))
        calibrated = copy.deepcopy(model)
        export_hf_checkpoint(model, export_dir=directory)
        more = {'calibration': calibration.astype(np.int32)}
        weights = dequantized(stored_tensors(directory))
        if 'kv' in name:
            more['logits_activations'] = logits_with_activations(calibrated, weights, variant)
        write_golden(directory, variant, weights, **more)
