"""Expert matrices in MXFP4, as gpt-oss is published: 4-bit floats in blocks of 32 that share an exponent.

OCP Microscaling Formats (MX) Specification v1.0, MXFP4: elements E2M1, scales E8M0. A matrix lies in two tensors:
`NAME_blocks` uint8 [E, out, in / 32, 16], two numbers to a byte, the first in the low half; and `NAME_scales` uint8
[E, out, in / 32]. Every number is exact in bfloat16, which has the exponents of the scales.
"""

import functools
import os
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from jpt.checkpoint.safetensors import TensorSpec
from jpt.checkpoint.shards import ShardedReader
from jpt.checkpoint.tree import listing

BLOCK = 32
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_BLOCKS, _SCALES = '_blocks', '_scales'
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the lower three bits of a code; the fourth is the sign
_BIAS, _LARGEST_SAFE, _NAN = 127, 252, 255  # of scales: 6 * 2^(253 - 127) is beyond bfloat16


@functools.cache
def _pairs() -> np.ndarray:
    """The two numbers that a byte holds under a scale, at 256 * scale + byte: two bfloat16, seen as one uint32."""
    codes = np.array([sign * magnitude for sign in (1, -1) for magnitude in _MAGNITUDES])
    byte = np.arange(256)
    elements = np.stack([codes[byte & 15], codes[byte >> 4]], axis=-1)
    powers = np.ldexp(1.0, byte - _BIAS)
    powers[_NAN] = np.nan
    with np.errstate(over='ignore'):
        return (powers[:, None, None] * elements).astype(BFLOAT16).reshape(-1).view(np.uint32)


def unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The numbers of packed rows: blocks [..., G, 16] and scales [..., G], both uint8, to bfloat16 [..., 32 G].

    Raises:
        ValueError: a scale that is no number, or so large that a number of its block is not finite.
    """
    places = (scales.astype(np.uint16) << 8)[..., None] | blocks
    # Ten times as fast as indexing with scales and blocks (400 against 40 million numbers a second on a CPU).
    pairs = _pairs().take(places, mode='clip')
    values = pairs.view(BFLOAT16).reshape(*scales.shape[:-1], BLOCK * scales.shape[-1])
    if scales.size and scales.max() > _LARGEST_SAFE and not np.isfinite(values).all():
        raise ValueError(f'a scale of {scales.max()}: expected at most {_LARGEST_SAFE}, so that all numbers are finite')
    return values


class PackedReader(ShardedReader):
    """The tensors of a model whose expert matrices are packed, with these as the bfloat16 [E, in, out] that they mean.

    Raises:
        FileNotFoundError, ValueError: as `ShardedReader`; or blocks and scales that do not belong together.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        super().__init__(directory)
        packed = packed_specs(self.tensors, str(self.directory))
        self._packed = frozenset(packed)
        parts = {name + ending for name in packed for ending in (_BLOCKS, _SCALES)}
        self.tensors = {name: spec for name, spec in self.tensors.items() if name not in parts} | packed

    def fill(self, target: np.ndarray, name: str, index: tuple[slice, ...], transposed: bool = False) -> None:
        """As `ShardedReader.fill`; of a packed tensor only the groups that hold what is asked for are unpacked."""
        if name not in self._packed:
            super().fill(target, name, index, transposed)
            return
        out_first = target if transposed else target.swapaxes(-1, -2)
        experts, rows, columns = index if transposed else (index[0], index[2], index[1])
        blocks, scales = self.view(name + _BLOCKS), self.view(name + _SCALES)
        first, stop, step = columns.indices(BLOCK * blocks.shape[2])
        groups = slice(first // BLOCK, -(-stop // BLOCK))
        cut = slice(first - BLOCK * groups.start, stop - BLOCK * groups.start, step)
        # One expert at a time, so that little but the target is in memory.
        for to, expert in enumerate(range(*experts.indices(len(blocks)))):
            try:
                values = unpack(blocks[expert, rows, groups], scales[expert, rows, groups])
            except ValueError as error:
                raise ValueError(f'{self.directory}: {name}{_SCALES}, expert {expert}: {error}') from error
            out_first[to] = values[:, cut]

    def release(self, name: str) -> None:
        for part in (name + _BLOCKS, name + _SCALES) if name in self._packed else (name,):
            super().release(part)


def packed_specs(tensors: Mapping[str, TensorSpec], place: str) -> dict[str, TensorSpec]:
    """The specs of all packed matrices, by their names and shapes without packing.

    Raises:
        ValueError: names blocks without scales, scales without blocks, and those of another shape or dtype.
    """
    names = {name[: -len(ending)] for name in tensors for ending in (_BLOCKS, _SCALES) if name.endswith(ending)}
    lines = [line for name in sorted(names) for line in _faults(tensors, name)]
    if lines:
        raise ValueError(f'{place}: matrices in MXFP4 that are not whole:\n  {listing(lines)}')
    found = {}
    for name in sorted(names):
        experts, outputs, groups, _ = tensors[name + _BLOCKS].shape
        found[name] = TensorSpec(BFLOAT16, (experts, BLOCK * groups, outputs))
    return found


def _faults(tensors: Mapping[str, TensorSpec], name: str) -> list[str]:
    blocks, scales = tensors.get(name + _BLOCKS), tensors.get(name + _SCALES)
    if blocks is None or scales is None:
        missing, other = (_BLOCKS, _SCALES) if blocks is None else (_SCALES, _BLOCKS)
        return [f'{name}{missing}: missing beside {name}{other}']
    lines = [f'{name}: stored packed and as it is; expected one of both'] if name in tensors else []
    if len(blocks.shape) != 4 or blocks.shape[-1] != BLOCK // 2:
        lines.append(f'{name}{_BLOCKS}: has shape {list(blocks.shape)}, expected [experts, out, in / 32, 16]')
    elif scales.shape != blocks.shape[:-1]:
        lines.append(f'{name}{_SCALES}: has shape {list(scales.shape)}, expected {list(blocks.shape[:-1])}')
    for ending, spec in ((_BLOCKS, blocks), (_SCALES, scales)):
        if spec.dtype != np.uint8:
            lines.append(f'{name}{ending}: is {spec.dtype}, expected uint8')
    return lines
