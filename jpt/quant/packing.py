"""What a quantized weight is made of, said without its values: for checkpoints, and for trees of shapes and places."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jpt.quant.formats import Format
from jpt.quant.tensors import CODES, PARTS, SCALES, QTensor


class Part(NamedTuple):
    """One array of a quantized weight."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Packing(NamedTuple):
    """How a weight is quantized, and which arrays come with its codes."""

    form: Format
    weight_dtype: str
    input_scale: bool = False
    input_factor: bool = False

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        """The arrays of a weight [..., out, in], by the names of QTensor's fields.

        Raises:
            ValueError: a shape that the format does not take.
        """
        form = self.form
        form.check(shape, f'{form.element} weight')
        *lead, out, inner = shape
        found = {
            'codes': Part((*lead, out, inner // 2 if form.packed else inner), jnp.dtype(CODES[form.element])),
            'scale': Part(form.scales_of(shape), jnp.dtype(SCALES[form.scale])),
        }
        if form.has_second:
            found['scale_2'] = Part((*lead, 1, 1), np.dtype(np.float32))
        if self.input_scale:
            found['input_scale'] = Part(tuple(lead), np.dtype(np.float32))
        if self.input_factor:
            found['input_factor'] = Part((*lead, inner), np.dtype(np.float32))
        return found

    def assembled(self, parts: Mapping[str, Any]) -> QTensor:
        """The weight, from its arrays or from anything that stands in their place."""
        return QTensor(**parts, format=self.form, weight_dtype=self.weight_dtype)


def packing_of(weight: QTensor) -> Packing:
    """How a weight is quantized."""
    beside = weight.input_scale is not None, weight.input_factor is not None
    return Packing(weight.format, weight.weight_dtype, *beside)


def parts_of(weight: QTensor) -> dict[str, Any]:
    """The arrays of a weight by name."""
    found = {name: getattr(weight, name) for name in PARTS}
    return {name: part for name, part in found.items() if part is not None}
