"""The weights and tiny models that the makers of tests/golden/quantized share, and how arrays are stored."""

import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

OUT = pathlib.Path(__file__).parent / 'quantized'
WEIGHTS = OUT / 'weights.npz'
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}
Tensors = dict[str, torch.Tensor]


def random_of(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def gaussian() -> np.ndarray:
    return 0.02 * random_of('gaussian').standard_normal((16, 96))


def ragged() -> np.ndarray:
    """One full 128x128 block and three that stick out, rows of different size."""
    random = random_of('ragged')
    return random.standard_normal((129, 133)) * np.exp(random.standard_normal((129, 1)))


def one_row() -> np.ndarray:
    return random_of('one_row').standard_normal((1, 128))


def zero_block() -> np.ndarray:
    """The second half of the columns, and one whole row, are zero."""
    weight = random_of('zero_block').standard_normal((8, 256))
    weight[:, 128:] = 0
    weight[3] = 0
    return weight


def zeros() -> np.ndarray:
    return np.zeros((2, 128))


def tiny() -> np.ndarray:
    """About 1e-30: every quotient and scale of every format is a normal number."""
    return 1e-30 * random_of('tiny').standard_normal((4, 128))


def subnormal() -> np.ndarray:
    """Rows from 1e-35 down to 1e-42: the scales (and below 1e-38 the weights) are subnormal in float32."""
    return random_of('subnormal').standard_normal((8, 128)) * 10.0 ** -np.arange(35, 43)[:, None]


def huge() -> np.ndarray:
    """Up to 3e38, near the end of float32 and bfloat16."""
    return random_of('huge').uniform(-3e38, 3e38, (4, 128))


def outliers() -> np.ndarray:
    """Heavy tails (Student's t, two degrees of freedom) and three columns a thousand times larger."""
    weight = random_of('outliers').standard_t(2, (8, 256))
    weight[:, [5, 100, 200]] *= 1000
    return weight


def wide_range() -> np.ndarray:
    """Magnitudes from 2^-40 to 2^40 side by side: most codes of a block are subnormal or zero."""
    random = random_of('wide_range')
    return random.choice([-1.0, 1.0], (8, 128)) * np.exp2(random.uniform(-40, 40, (8, 128)))


def ties_e4m3() -> np.ndarray:
    """Midpoints of all neighbours of E4M3, of both signs; the largest value of a row is 448 times a power of two."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    row = np.concatenate([(codes[1:] + codes[:-1]) / 2, [0, 448]])
    return np.stack([row, -row, row * 2.0**-7, -row * 2.0**5])


def ties_e2m1() -> np.ndarray:
    """Midpoints of E2M1 in blocks of 16 whose largest value is 6 times a value of E4M3; 2688 in all."""
    bounds = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    block = np.concatenate([bounds, -bounds])
    scales = np.array([448.0, 1.0, 2.0**-6, 1.5, 104.0, 0.25, 2.0**-9, 3 * 2.0**-8])
    return np.concatenate([block * scale for scale in scales]).reshape(1, 128) * np.array([[1.0], [-1.0]])


def ties_int() -> np.ndarray:
    """Half-integers: two rows for int8 (largest value 127), two for int4 in groups of 128 (largest value 7)."""
    eight = np.concatenate([np.arange(128) - 0.5, [127.0], -np.arange(127) - 0.5])
    four = np.concatenate([[7.0], np.resize(np.arange(-7, 7) + 0.5, 127)])
    return np.stack([eight, -eight, np.concatenate([four, -four]), np.concatenate([four / 4, four * 8])])


CASES: dict[str, Callable[[], np.ndarray]] = {
    function.__name__: function
    for function in (
        *(gaussian, ragged, one_row, zero_block, zeros, tiny, subnormal, huge, outliers, wide_range),
        *(ties_e4m3, ties_e2m1, ties_int),
    )
}


def weights() -> Iterator[tuple[str, str, torch.Tensor]]:
    """Name, dtype's name and values of every weight, [out, in]; bfloat16 is the rounded float32."""
    for name, make in CASES.items():
        single = torch.from_numpy(make().astype(np.float32))
        for dtype_name, dtype in DTYPES.items():
            yield name, dtype_name, single.to(dtype)


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    """The values, or where numpy lacks the dtype the bits: uint8 for 8-bit floats, uint16 for bfloat16."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    if tensor.is_floating_point() and tensor.element_size() == 1:
        return tensor.view(torch.uint8).numpy()
    return tensor.numpy()


def store(peer: str, arrays: dict[str, np.ndarray]) -> None:
    """Replaces the arrays of one peer in weights.npz, and the weights themselves; the others stay."""
    kept: dict[str, Any] = {}
    if WEIGHTS.exists():
        with np.load(WEIGHTS) as file:
            kept = {name: file[name] for name in file.files if name.split('/')[0] not in (peer, 'weight')}
    kept |= {f'weight/{name}/{dtype}': bits_of(weight) for name, dtype, weight in weights()}
    kept |= {f'{peer}/{name}': array for name, array in arrays.items()}
    WEIGHTS.parent.mkdir(exist_ok=True)
    np.savez_compressed(WEIGHTS, **dict(sorted(kept.items())))
    print(f'{peer}: {len(arrays)} arrays, {WEIGHTS.name} is {WEIGHTS.stat().st_size} bytes')
