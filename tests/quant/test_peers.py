"""jpt's codes and scales beside those that ModelOpt and transformers wrote: none differs where these round once.

tests/golden/README.md says how the files were made, and where the libraries round more than once: ModelOpt's per-tensor
codes of bfloat16, and all that compressed-tensors writes.
"""

import functools
import pathlib

import ml_dtypes
import numpy as np
import pytest

from jpt.quant.formats import FORMATS, Format
from jpt.quant.tensors import quantize

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'quantized' / 'weights.npz'
FORMS = {
    'modelopt/fp8_block_128x128': FORMATS['fp8_block'],
    'modelopt/fp8_channel': FORMATS['fp8_weights'],
    'modelopt/fp8_tensor': FORMATS['fp8_tensor'],
    'modelopt/int8_channel': FORMATS['int8_weights'],
    'modelopt/int4_group_128': FORMATS['int4_weights'],
    'modelopt/w4a8': FORMATS['w4a8'],
    'modelopt/mxfp8': FORMATS['mxfp8'],
    'modelopt/nvfp4': FORMATS['nvfp4'],
    'transformers/fp8_block_1x128_ue8m0': Format('e4m3', 1, 128, 'e8m0'),
    'transformers/fp8_block_8x32_ue8m0': Format('e4m3', 8, 32, 'e8m0'),
}
# XLA on CPU takes numbers below 2^-126 for zero, and these have scales below it (docs/quantize.md, Exactness).
TOO_SMALL = ('subnormal',)
# A weight of zeros: ModelOpt's scales are 0 or NaN (per tensor, NVFP4), where jpt has 1.
ZEROS = {'modelopt/fp8_tensor': ('zeros',), 'modelopt/nvfp4': ('zeros',)}
# Per tensor, and per channel in bfloat16, ModelOpt rounds the quotient to bfloat16 first.
TWICE = ('modelopt/fp8_tensor', 'modelopt/fp8_channel')


@functools.cache
def stored():
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file.files}


def cases(group):
    found = sorted(
        name.removesuffix('/codes').removeprefix(f'{group}/') for name in stored() if name.startswith(f'{group}/')
    )
    for case in sorted({name.removesuffix('/scale').removesuffix('/scale_2') for name in found}):
        weight, dtype = case.split('/')
        if weight in TOO_SMALL + ZEROS.get(group, ()) or (group in TWICE and dtype == 'bfloat16'):
            continue
        yield case


def packed(codes, group):
    """ModelOpt's INT4 has rows two by two in a byte, where jpt has columns."""
    if group not in ('modelopt/int4_group_128', 'modelopt/w4a8'):
        return codes
    apart = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    return apart[0::2] | apart[1::2] << 4


@pytest.mark.parametrize('group', FORMS)
def test_no_code_and_no_scale_differs(group):
    seen = 0
    for case in cases(group):
        bits = stored()[f'weight/{case}']
        weight = bits.view(ml_dtypes.bfloat16) if bits.dtype == np.uint16 else bits
        tensor = quantize(weight, FORMS[group])
        theirs = {part: stored().get(f'{group}/{case}/{part}') for part in ('codes', 'scale', 'scale_2')}
        ours = packed(np.asarray(tensor.codes).view(np.uint8), group)
        np.testing.assert_array_equal(ours, theirs['codes'].view(np.uint8), case)
        scale = np.asarray(tensor.scale)
        same = scale.view(np.uint8 if theirs['scale'].dtype == np.uint8 else scale.dtype).reshape(-1)
        np.testing.assert_array_equal(same, theirs['scale'].reshape(-1), case)
        if theirs['scale_2'] is not None:
            assert np.asarray(tensor.scale_2).item() == theirs['scale_2']
        seen += 1
    assert seen >= 8
