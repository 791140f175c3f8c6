"""The formulas behind the stored codes and scales of other libraries, in plain numpy.

Every stored array is reproduced bit for bit, with one IEEE rounding per written operation; what a library does beyond
the plain formula stands in the formula's own lines. tests/golden/README.md describes the files.
"""

import functools
import json
import pathlib
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'quantized'
WEIGHTS = GOLDEN / 'weights.npz'
E4M3 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16
F32 = np.float32
E2M1_BOUNDS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], F32)
Arrays = dict[str, np.ndarray]

pytestmark = pytest.mark.filterwarnings('ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning')


@functools.cache
def stored() -> Arrays:
    with np.load(WEIGHTS) as file:
        return {name: file[name] for name in file.files}


def weight_of(case: str) -> np.ndarray:
    """The weight of NAME/DTYPE in its own dtype."""
    bits = stored()[f'weight/{case}']
    return bits.view(BF16) if bits.dtype == np.uint16 else bits


def groups_of(codes_scale: str) -> dict[str, list[str]]:
    """The weights NAME/DTYPE stored for every PEER/FORMAT."""
    found: dict[str, list[str]] = {}
    for name in stored():
        if name.endswith(codes_scale):
            peer, form, *case = name.removesuffix(codes_scale).split('/')
            found.setdefault(f'{peer}/{form}', []).append('/'.join(case))
    return found


def tiles(x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """[out, in] to [blocks, rows, blocks, columns], zeros where the last blocks stick out."""
    padded = np.pad(x, ((0, -x.shape[0] % rows), (0, -x.shape[1] % columns)))
    return padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)


def amax_of(x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """float32 [blocks, blocks]."""
    return np.abs(tiles(x.astype(F32), rows, columns)).max((1, 3))


def spread(scale: np.ndarray, x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A scale per block as one per element, [out, in]."""
    return scale.repeat(rows, 0).repeat(columns, 1)[: x.shape[0], : x.shape[1]]


def e4m3(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest E4M3, saturating: the cast alone gives NaN above 464."""
    return np.clip(x.astype(F32), -448, 448).astype(E4M3).view(np.uint8)


def e2m1(x: np.ndarray) -> np.ndarray:
    """Codes of the nearest E2M1, ties to the even code; the sign bit of whatever is below zero."""
    size = np.abs(x)
    above, at = np.searchsorted(E2M1_BOUNDS, size, side='left'), np.isin(size, E2M1_BOUNDS[[1, 3, 5]])
    return (above + at + 8 * (x < 0)).astype(np.uint8)


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Two to a byte, the second in the upper half."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def quotient(w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 weight / float32 scale, one rounding."""
    return w.astype(F32) / scale


def plain_fp8(w: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """The rule that this project means: amax / 448 (1 for a block of zeros), codes of the float32 quotient."""
    amax = amax_of(w, rows, columns)
    scale = np.where(amax == 0, F32(1), amax / F32(448))
    return e4m3(quotient(w, spread(scale, w, rows, columns))), scale


def exported_amax(amax: np.ndarray, bound: float) -> np.ndarray:
    """ModelOpt's static amax: the bound for zeros (so the scale is 1), else at least the least normal float32."""
    return np.where(amax == 0, F32(bound), np.maximum(amax, np.finfo(F32).tiny))


def modelopt_fp8_tensor(w: np.ndarray) -> Arrays:
    """No exception for zeros: NaN codes. A bfloat16 quotient is rounded to bfloat16 before it is cast."""
    scale = amax_of(w, *w.shape)[0, 0] / F32(448)
    return {'codes': e4m3(quotient(w, scale).astype(w.dtype)), 'scale': scale}


def modelopt_fp8_channel(w: np.ndarray) -> Arrays:
    scale = exported_amax(amax_of(w, 1, w.shape[1])[:, 0], 448) / F32(448)
    return {'codes': e4m3(quotient(w, scale[:, None])), 'scale': scale}


def modelopt_fp8_block(w: np.ndarray, largest: np.ndarray | None = None) -> Arrays:
    """A single block has a scalar, and in a model all single blocks with one input share the largest's."""
    amax = amax_of(w, 128, 128)
    if largest is not None and amax.size == 1:
        amax = np.full_like(amax, largest)
    scale = exported_amax(amax, 448) / F32(448)
    codes = e4m3(quotient(w, spread(scale, w, 128, 128)))
    return {'codes': codes, 'scale': scale[:, None, :, None] if scale.size > 1 else scale[0, 0]}


def int8(w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(w / scale), -128, 127)


def modelopt_int8(w: np.ndarray) -> Arrays:
    scale = exported_amax(amax_of(w, 1, w.shape[1])[:, 0], 127) / F32(127)
    return {'codes': int8(w.astype(F32), scale[:, None]).astype(np.int8), 'scale': scale}


def modelopt_int4(w: np.ndarray) -> Arrays:
    """Rows two by two in one byte, the second in the upper half."""
    scale = exported_amax(amax_of(w, 1, 128), 7) / F32(7)
    codes = np.clip(np.rint(quotient(w, spread(scale, w, 1, 128))), -8, 7).astype(np.int8).view(np.uint8) & 15
    return {'codes': nibbles(codes.T).T, 'scale': scale}


def modelopt_w4a8(w: np.ndarray) -> Arrays:
    """The same, and a second scale as if the weight were E4M3 per tensor; 1 of zeros."""
    amax = np.abs(w).max().astype(F32)
    return modelopt_int4(w) | {'scale_2': amax / F32(448) if amax else F32(1)}


def exponent(ratio: np.ndarray) -> np.ndarray:
    """ceil of log2 as float32 has it, at least -127 (that of zero, too); float64, so that powers of two are exact."""
    return np.maximum(np.ceil(np.log2(ratio.astype(np.float64)).astype(F32)), -127).astype(np.float64)


def modelopt_mxfp8(w: np.ndarray) -> Arrays:
    power = exponent(amax_of(w, 1, 32) / F32(448))
    scaled = w.astype(F32) * spread(np.exp2(-power).astype(F32), w, 1, 32)
    return {'codes': e4m3(scaled), 'scale': (power + 127).astype(np.uint8)}


def modelopt_mxfp4(w: np.ndarray) -> Arrays:
    """Ties go down, not to even; a zero gets the sign bit."""
    power = exponent(amax_of(w, 1, 32) / F32(6))
    scaled = quotient(w, spread(np.exp2(power).astype(F32), w, 1, 32)).astype(w.dtype).astype(F32)
    codes = np.searchsorted(E2M1_BOUNDS, np.abs(scaled), side='left') + 8 * (scaled <= 0)
    return {'codes': nibbles(codes.astype(np.uint8)), 'scale': (power + 127).astype(np.uint8)}


def modelopt_nvfp4(w: np.ndarray, largest: np.ndarray | None = None) -> Arrays:
    """A tensor of zeros gives 0 / 0. `largest`: the greatest magnitude of all matrices that share scale_2."""
    scale_2 = (np.abs(w).max() if largest is None else largest).astype(F32) / F32(6 * 448)
    block = amax_of(w, 1, 16) / (F32(6) * scale_2)
    block = np.where(block == 0, F32(1), block)
    scale = np.clip(block, F32(2**-9), F32(448)).astype(E4M3)
    codes = e2m1(quotient(w, spread(scale.astype(F32) * scale_2, w, 1, 16)))
    return {'codes': nibbles(codes), 'scale': scale.view(np.uint8), 'scale_2': scale_2}


def transformers_fp8(w: np.ndarray, rows: int, columns: int, rounds_up: bool) -> Arrays:
    """Codes of a product with 448 / amax (a reciprocal and a product), the stored scale another reciprocal."""
    amax = amax_of(w, rows, columns)
    forward = np.where(amax > 0, (F32(1) / np.where(amax > 0, amax, F32(1))) * F32(448), F32(1))
    scale = F32(1) / forward
    stored_scale = scale
    if rounds_up:
        power = exponent(np.maximum(scale, np.finfo(F32).tiny))
        scale, stored_scale = np.exp2(power).astype(F32), (power + 127).astype(np.uint8)
        forward = F32(1) / scale
    return {'codes': e4m3(w.astype(F32) * spread(forward, w, rows, columns)), 'scale': stored_scale}


def compressed_scale(w: np.ndarray, rows: int, columns: int, bound: float) -> np.ndarray:
    """In the weight's dtype; zero becomes the dtype's epsilon."""
    scale = (amax_of(w, rows, columns) / F32(bound)).astype(w.dtype)
    return np.where(scale == 0, ml_dtypes.finfo(w.dtype).eps, scale)


def compressed_quotient(w: np.ndarray, scale: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Rounded to the weight's dtype; the zero point that is added makes a negative zero positive."""
    return quotient(w, spread(scale, w, rows, columns).astype(F32)).astype(w.dtype).astype(F32) + F32(0)


def bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint16) if x.dtype == BF16 else x


def compressed_fp8(w: np.ndarray, rows: int, columns: int) -> Arrays:
    scale = compressed_scale(w, rows, columns, 448)
    return {'codes': e4m3(compressed_quotient(w, scale, rows, columns)), 'scale': bits(scale)}


def compressed_int4(w: np.ndarray) -> Arrays:
    """The bound is half of the range, 7.5; eight codes plus 8 to an int32, the first lowest."""
    scale = compressed_scale(w, 1, 128, 7.5)
    codes = np.clip(np.rint(compressed_quotient(w, scale, 1, 128)), -8, 7).astype(np.int64) + 8
    words = (codes.reshape(len(codes), -1, 8) << 4 * np.arange(8)).sum(-1)
    return {'codes': words.astype(np.uint32).view(np.int32), 'scale': bits(scale)}


def compressed_nvfp4(w: np.ndarray, largest: np.ndarray | None = None) -> Arrays:
    """The reciprocal of the tensor's scale and the blocks' amax / 6, both in the weight's dtype.

    Zero becomes 1/8, and the tensor's reciprocal 1 where it overflows.
    """
    largest = np.maximum(np.abs(w).max() if largest is None else largest, ml_dtypes.finfo(w.dtype).tiny)
    global_scale = ((F32(1) / F32(largest)).astype(w.dtype).astype(F32) * F32(6 * 448)).astype(w.dtype).astype(F32)
    global_scale = F32(1) if np.isinf(global_scale) else global_scale
    block = (amax_of(w, 1, 16) / F32(6)).astype(w.dtype).astype(F32)
    scale = np.clip(block * global_scale, -448, 448).astype(E4M3)
    scale = np.where(scale == 0, E4M3(0.125), scale)
    codes = e2m1(quotient(w, spread(scale.astype(F32) / global_scale, w, 1, 16)))
    return {'codes': nibbles(codes), 'scale': scale.view(np.uint8), 'global_scale': np.full(1, global_scale)}


FORMULAS = {
    'modelopt/fp8_tensor': modelopt_fp8_tensor,
    'modelopt/fp8_channel': modelopt_fp8_channel,
    'modelopt/fp8_block_128x128': modelopt_fp8_block,
    'modelopt/int8_channel': modelopt_int8,
    'modelopt/int4_group_128': modelopt_int4,
    'modelopt/w4a8': modelopt_w4a8,
    'modelopt/mxfp8': modelopt_mxfp8,
    'modelopt/mxfp4': modelopt_mxfp4,
    'modelopt/nvfp4': modelopt_nvfp4,
    'transformers/fp8_block_8x32_float': lambda w: transformers_fp8(w, 8, 32, False),
    'transformers/fp8_block_8x32_ue8m0': lambda w: transformers_fp8(w, 8, 32, True),
    'transformers/fp8_block_1x128_float': lambda w: transformers_fp8(w, 1, 128, False),
    'transformers/fp8_block_1x128_ue8m0': lambda w: transformers_fp8(w, 1, 128, True),
    'compressed_tensors/fp8_channel': lambda w: compressed_fp8(w, 1, w.shape[1]),
    'compressed_tensors/fp8_block_128x128': lambda w: compressed_fp8(w, 128, 128),
    'compressed_tensors/int4_group_128': compressed_int4,
    'compressed_tensors/nvfp4': compressed_nvfp4,
}


def plain_power(w: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """The same with the scale's next power of two, at least 2^-127."""
    amax = amax_of(w, rows, columns)
    scale = np.exp2(exponent(np.where(amax == 0, F32(1), amax / F32(448)))).astype(F32)
    return e4m3(quotient(w, spread(scale, w, rows, columns))), scale


PLAIN = {
    'modelopt/fp8_tensor': lambda w: plain_fp8(w, *w.shape),
    'modelopt/fp8_channel': lambda w: plain_fp8(w, 1, w.shape[1]),
    'modelopt/fp8_block_128x128': lambda w: plain_fp8(w, 128, 128),
    'modelopt/mxfp8': lambda w: plain_power(w, 1, 32),
    'transformers/fp8_block_8x32_float': lambda w: plain_fp8(w, 8, 32),
    'transformers/fp8_block_8x32_ue8m0': lambda w: plain_power(w, 8, 32),
    'transformers/fp8_block_1x128_float': lambda w: plain_fp8(w, 1, 128),
    'transformers/fp8_block_1x128_ue8m0': lambda w: plain_power(w, 1, 128),
    'compressed_tensors/fp8_channel': lambda w: plain_fp8(w, 1, w.shape[1]),
    'compressed_tensors/fp8_block_128x128': lambda w: plain_fp8(w, 128, 128),
}
# Codes and scales that differ from the plain rule, of all weights of one dtype; a group that is absent differs nowhere.
DIFFERING = {
    ('modelopt/fp8_tensor', 'float32'): (256, 1),  # the zeros
    ('modelopt/fp8_tensor', 'bfloat16'): (459, 1),  # and the quotient in bfloat16
    ('modelopt/fp8_channel', 'float32'): (511, 4),  # subnormal scales
    ('modelopt/fp8_channel', 'bfloat16'): (201, 2),
    ('modelopt/mxfp8', 'float32'): (0, 44),  # a block of zeros has 2^-127
    ('modelopt/mxfp8', 'bfloat16'): (0, 52),
    ('transformers/fp8_block_8x32_float', 'float32'): (0, 9),  # two reciprocals
    ('transformers/fp8_block_8x32_float', 'bfloat16'): (9, 12),
    ('transformers/fp8_block_1x128_float', 'float32'): (0, 4),
    ('transformers/fp8_block_1x128_float', 'bfloat16'): (6, 4),
    ('compressed_tensors/fp8_channel', 'float32'): (2, 3),  # negative zeros; scales of zeros
    ('compressed_tensors/fp8_channel', 'bfloat16'): (710, 52),  # and everything in bfloat16
    ('compressed_tensors/fp8_block_128x128', 'float32'): (2, 2),
    ('compressed_tensors/fp8_block_128x128', 'bfloat16'): (1544, 15),
}


def values(scale: np.ndarray) -> np.ndarray:
    """Stored scales as float32: bits of bfloat16 in uint16, exponents in uint8."""
    if scale.dtype == np.uint16:
        return scale.view(BF16).astype(F32)
    return np.exp2(scale.astype(np.float64) - 127).astype(F32) if scale.dtype == np.uint8 else scale


def test_all_formats_of_all_weights_are_stored():
    found = groups_of('/codes')
    assert found.keys() == FORMULAS.keys()
    assert {case for cases in found.values() for case in cases} == {
        name.removeprefix('weight/') for name in stored() if name.startswith('weight/')
    }


@pytest.mark.parametrize('group', FORMULAS)
def test_formula_gives_the_stored_bits(group: str):
    for case in groups_of('/codes')[group]:
        computed = FORMULAS[group](weight_of(case))
        names = {name.split('/')[-1] for name in stored() if name.startswith(f'{group}/{case}/')}
        assert computed.keys() == names
        for name, array in computed.items():
            expected = stored()[f'{group}/{case}/{name}']
            array = np.asarray(array)
            assert (array.dtype, array.shape) == (expected.dtype, expected.shape), (case, name)
            assert array.tobytes() == expected.tobytes(), (case, name)


@pytest.mark.parametrize('group', PLAIN)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_differences_from_the_plain_rule(group: str, dtype: str):
    codes_differ = scales_differ = 0
    for case in groups_of('/codes')[group]:
        if case.endswith(f'/{dtype}'):
            codes, scale = PLAIN[group](weight_of(case))
            codes_differ += int((codes != stored()[f'{group}/{case}/codes']).sum())
            scales_differ += int((scale.ravel() != values(stored()[f'{group}/{case}/scale']).ravel()).sum())
    assert (codes_differ, scales_differ) == DIFFERING.get((group, dtype), (0, 0))


# Of each checkpoint: the source of its weights, the stored kinds by the names that formulas use, and the formula.
MODELOPT = {'codes': 'weight', 'scale': 'weight_scale'}
PACKED = {'codes': 'weight_packed', 'scale': 'weight_scale'}
CHECKPOINTS: dict[str, tuple[str, dict[str, str], Callable[..., Arrays]]] = {
    'modelopt_fp8_kv': ('llama', MODELOPT, modelopt_fp8_tensor),
    'modelopt_nvfp4': ('llama', MODELOPT | {'scale_2': 'weight_scale_2'}, modelopt_nvfp4),
    'modelopt_fp8_block': ('qwen3', MODELOPT, modelopt_fp8_block),
    'transformers_fp8': (
        'qwen3',
        {'codes': 'weight', 'scale': 'weight_scale_inv'},
        lambda w: transformers_fp8(w, 128, 128, False),
    ),
    'compressed_fp8_dynamic': ('llama', MODELOPT, lambda w: compressed_fp8(w, 1, w.shape[1])),
    'compressed_fp8_block': ('qwen3', MODELOPT, lambda w: compressed_fp8(w, 128, 128)),
    'compressed_w4a16': ('qwen3', PACKED, compressed_int4),
    'compressed_nvfp4a16': ('llama', PACKED | {'global_scale': 'weight_global_scale'}, compressed_nvfp4),
}
SHARING = ('modelopt_nvfp4', 'modelopt_fp8_block', 'compressed_nvfp4a16')
FUSED = (('q_proj', 'k_proj', 'v_proj'), ('gate_proj', 'up_proj'))
# Names of the file format, and the dtype that holds the values or, where numpy has none, the bits.
DTYPES = {'F32': F32, 'BF16': np.uint16, 'F8_E4M3': np.uint8, 'U8': np.uint8, 'I32': np.int32, 'I64': np.int64}


def tensors_of(directory: str) -> Arrays:
    """Every tensor of a checkpoint's one safetensors file."""
    data = (GOLDEN / directory / 'model.safetensors').read_bytes()
    start = 8 + int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:start])
    header.pop('__metadata__', None)
    return {
        name: np.frombuffer(data[start:][slice(*entry['data_offsets'])], DTYPES[entry['dtype']]).reshape(entry['shape'])
        for name, entry in header.items()
    }


def largest_of_fused(source: Arrays, layer: str) -> np.ndarray:
    """The greatest magnitude of the matrices that a server fuses with this one."""
    block, _, kind = layer.rpartition('.')
    kinds = next((fused for fused in FUSED if kind in fused), (kind,))
    return np.max([np.abs(source[f'{block}.{other}.weight'].view(BF16)).max() for other in kinds])


@pytest.mark.parametrize('directory', CHECKPOINTS)
def test_formula_gives_the_bits_of_a_checkpoint(directory: str):
    name, kinds, formula = CHECKPOINTS[directory]
    source, quantized = tensors_of(name), tensors_of(directory)
    layers = [key.removesuffix(f'.{kinds["scale"]}') for key in quantized if key.endswith(f'.{kinds["scale"]}')]
    # Keys and values have 32 rows, which transformers' blocks of 128 do not divide.
    assert len(layers) == {'llama': 14, 'qwen3': 5 if directory == 'transformers_fp8' else 7}[name]
    for layer in layers:
        w = source[f'{layer}.weight'].view(BF16)
        shared = (largest_of_fused(source, layer),) if directory in SHARING else ()
        for key, array in formula(w, *shared).items():
            expected = quantized[f'{layer}.{kinds[key]}']
            assert np.asarray(array).tobytes() == expected.tobytes(), (layer, key)
            assert np.shape(array) == expected.shape, (layer, key)
