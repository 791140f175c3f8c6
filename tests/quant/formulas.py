"""The formulas of quantized weights in numpy, one line each: what codes and scales must be, bit by bit.

From the sources that docs/quantize.md names; ml_dtypes rounds.
"""

import ml_dtypes
import numpy as np

E4M3, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
F32 = np.float32


def blocks_amax(w, rows, columns):
    """The largest |w| of every block, float32."""
    out, inner = w.shape
    rows, columns = rows or out, columns or inner
    found = np.zeros((-(-out // rows), -(-inner // columns)), F32)
    for i in range(found.shape[0]):
        for j in range(found.shape[1]):
            found[i, j] = np.abs(w[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]).max()
    return found


def spread(scale, shape, rows, columns):
    """Every element's scale."""
    out, inner = shape
    return scale[np.arange(out) // (rows or out)][:, np.arange(inner) // (columns or inner)]


def expected(weight, form):
    """(codes as integers, E4M3 or E2M1 numbers, scales as stored, second scale or None, dequantized numbers)."""
    w = weight.astype(F32)
    amax = blocks_amax(w, form.rows, form.columns)
    largest = F32({'e4m3': 448, 'e2m1': 6, 'int8': 127, 'int4': 7}[form.element])
    second = None
    if form.scale == 'e4m3':
        second = amax.max() / F32(2688) if amax.any() else F32(1)
        stored = np.clip(amax / (F32(6) * second), F32(2.0**-9), F32(448))
        stored = np.where(amax > 0, stored, F32(1)).astype(E4M3)
        scale = stored.astype(F32) * second
    elif form.scale == 'e8m0':
        with np.errstate(divide='ignore'):
            exponent = np.ceil(np.log2((amax / largest).astype(np.float64)))
        stored = (np.clip(exponent, -127, 127) + 127).astype(np.uint8)
        if (form.rows, form.columns) != (1, 32):  # a block of zeros: 1, as transformers has it; in MX the least
            stored = np.where(amax > 0, stored, 127).astype(np.uint8)
        scale = np.ldexp(F32(1), stored.astype(int) - 127).astype(F32)
    elif form.scale == 'power_of_two':
        with np.errstate(divide='ignore'):
            exponent = np.clip(np.ceil(np.log2((amax / largest).astype(np.float64))), -126, 127)
        stored = scale = np.where(amax > 0, np.exp2(exponent), 1).astype(F32)
    else:
        stored = scale = np.where(amax > 0, amax / largest, F32(1))
    if form.scale == 'e4m3_grid':
        second = amax.max() / F32(448) if amax.any() else F32(1)
    multiplier = spread(scale, w.shape, form.rows, form.columns)
    quotient = w / multiplier
    if form.element in ('e4m3', 'e2m1'):
        codes = np.clip(quotient, -largest, largest).astype(E4M3 if form.element == 'e4m3' else E2M1)
    else:
        codes = np.clip(np.rint(quotient), -largest, largest).astype(np.int8)
    numbers = codes.astype(F32) * multiplier
    if form.scale == 'e4m3_grid':
        numbers = np.clip(numbers / second, F32(-448), F32(448)).astype(E4M3).astype(F32) * second
    return codes, stored, second, numbers
