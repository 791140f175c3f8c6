"""The layout of transformers' FineGrainedFP8, which is DeepSeek-V3's own: `quant_method` 'fp8'.

A linear layer X has X.weight in E4M3 [out, in] and X.weight_scale_inv [ceil(out / rows), ceil(in / columns)], which is
a multiplier in spite of its name: float32, or E8M0 where `scale_fmt` is 'ue8m0'. transformers 5.23
(utils/quantization_config.py, integrations/finegrained_fp8.py) and DeepSeek-V3 (inference/fp8_cast_bf16.py) are the
sources; vLLM and SGLang read the same, which was read, not run.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jpt.checkpoint.dtypes import E8M0
from jpt.checkpoint.layouts.stored import FLOATS, Kept, Matrix, Said, Scheme, Stored, Written
from jpt.checkpoint.safetensors import TensorSpec
from jpt.quant.formats import Format, Scale

SCALE = 'weight_scale_inv'
_FIELDS = {'quant_method', 'fmt', 'weight_block_size', 'activation_scheme', 'scale_fmt', 'dequantize', 'expert_dtype'}
_NAMES = {'modules_to_not_convert', 'modules_to_convert', 'ignored_layers'}  # the tensors say which these are


class Fp8:
    """See the module."""

    method = 'fp8'
    cache = None

    def said(self, given: Mapping[str, Any], beside: Mapping[str, Any] | None) -> Said:
        """What the configs of a directory in this layout say of its weights; ValueError for what is not known."""
        if beside is not None:
            raise ValueError(f'hf_quant_config.json beside quant_method={self.method!r}: expected one of the two')
        rows, columns = _block(given)
        powers = given.get('scale_fmt') == 'ue8m0'

        def scheme_of(module: str, tensors: Mapping[str, TensorSpec]) -> Scheme:
            spec = tensors.get(f'{module}.{SCALE}')
            in_bytes = powers and spec is not None and spec.dtype == E8M0
            return _scheme(rows, columns, 'e8m0' if in_bytes else 'power_of_two' if powers else 'float32')

        return Said(scheme_of, cache=False)

    def scheme(self, matrix: Matrix) -> Scheme:
        """How a matrix lies in this layout; ValueError with the reason where it has no place."""
        form = matrix.packing.form
        if form.element != 'e4m3' or not form.rows or not form.columns or form.inputs != 'block' or form.input_columns:
            raise ValueError('holds blocks of E4M3 whose inputs are rounded alike')
        scheme = _scheme(form.rows, form.columns, form.scale)
        lacking = scheme.lacks(matrix.packing)
        if lacking:
            raise ValueError(lacking)
        return scheme

    def written(self, chosen: Sequence[tuple[Matrix, Scheme]], kept: Kept, cache: bool) -> Written:
        """What the configs of a directory with these matrices say; ValueError where they cannot."""
        forms = {scheme.form for _, scheme in chosen}
        if len(forms) > 1:
            raise ValueError(f'holds blocks of one size, not {len(forms)} formats')
        form = forms.pop()
        config = {
            'quant_method': self.method,
            'fmt': 'e4m3',
            'activation_scheme': 'dynamic',
            'weight_block_size': [form.rows, form.columns],
            'scale_fmt': 'float' if form.scale == 'float32' else 'ue8m0',
            'modules_to_not_convert': list(kept.linear),
        }
        return Written(config, {})


def _scheme(rows: int, columns: int, scale: Scale) -> Scheme:
    # A byte that says a power of two goes with 'e8m0' alone; float32 is what others have widened to.
    dtypes = ('F8_E8M0',) if scale == 'e8m0' else FLOATS
    form = Format('e4m3', rows, columns, scale, 'block')
    return Scheme('fp8', form, (Stored('codes', 'weight', ('F8_E4M3',)), Stored('scale', SCALE, dtypes)))


def _block(given: Mapping[str, Any]) -> tuple[int, int]:
    unknown = sorted(set(given) - _FIELDS - _NAMES)
    if unknown:
        raise ValueError(f'config.json: quantization_config has fields that jpt does not know: {", ".join(unknown)}')
    expected = {'fmt': ('e4m3', None), 'activation_scheme': ('dynamic',), 'expert_dtype': ('fp8', None)}
    for name, allowed in expected.items():
        if given.get(name, allowed[0]) not in allowed:
            raise ValueError(f'config.json: quantization_config.{name}={given[name]!r}: expected {allowed[0]!r}')
    block = given.get('weight_block_size', (128, 128))
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise ValueError(f'config.json: quantization_config.weight_block_size={block!r}: expected two numbers above 0')
    return block[0], block[1]
