"""Names of number formats: the codes of safetensors headers, the names a user types, and numpy's own types."""

import jax
import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

# https://github.com/huggingface/safetensors, "Format"; sub-byte formats are packed there and are not read here.
SAFETENSORS_DTYPES: dict[str, np.dtype] = {
    'BOOL': np.dtype(np.bool_),
    'U8': np.dtype(np.uint8),
    'I8': np.dtype(np.int8),
    'U16': np.dtype(np.uint16),
    'I16': np.dtype(np.int16),
    'U32': np.dtype(np.uint32),
    'I32': np.dtype(np.int32),
    'U64': np.dtype(np.uint64),
    'I64': np.dtype(np.int64),
    'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
    'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
    'F8_E8M0': np.dtype(ml_dtypes.float8_e8m0fnu),
    'F16': np.dtype(np.float16),
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'F32': np.dtype(np.float32),
    'F64': np.dtype(np.float64),
}
E8M0 = SAFETENSORS_DTYPES['F8_E8M0']  # in memory as its bytes, uint8: it has no zero and no arithmetic
SAFETENSORS_CODES: dict[np.dtype, str] = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}

# What weights may be cast to on request; eight-bit formats need scales, so they come from jpt.quantize instead.
CAST_TARGETS: dict[str, np.dtype] = {
    'float32': np.dtype(np.float32),
    'float16': np.dtype(np.float16),
    'bfloat16': np.dtype(ml_dtypes.bfloat16),
    'float64': np.dtype(np.float64),
}


def cast_target(dtype: DTypeLike | None, where: str = 'dtype') -> np.dtype | None:
    """The numpy dtype that weights are to be cast to; None keeps every stored dtype.

    Args:
        dtype: None, a name such as 'bfloat16', or a dtype.
        where: what to call the argument in the error.

    Raises:
        ValueError: not one of float32, float16, bfloat16, float64.
    """
    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in CAST_TARGETS:
        raise ValueError(f'{where}={name!r}: expected one of {", ".join(CAST_TARGETS)}, or none to keep what is stored')
    return CAST_TARGETS[name]


def is_floating(dtype: np.dtype) -> bool:
    """Whether a numpy dtype holds floating-point numbers, the formats of ml_dtypes included."""
    return bool(jax.dtypes.issubdtype(dtype, np.floating))


def cast(array: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """The array in the dtype asked for, rounded to nearest even; integers, and dtype None, are left as they are."""
    if dtype is None or array.dtype == dtype or not is_floating(array.dtype):
        return array
    return array.astype(dtype)
