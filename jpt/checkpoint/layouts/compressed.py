"""The layout of compressed-tensors, which llm-compressor writes: `quant_method` 'compressed-tensors'.

Groups of layers have `weights` and `input_activations` each: bits, type, and a strategy that says which elements share
a scale. Codes are X.weight, or X.weight_packed where four bits are packed (and int8 of weights alone, in words of
int32, with X.weight_shape beside). Scales are multipliers X.weight_scale in the dtype of the weight, which float32
holds exactly; they are written in that dtype where it holds them, else in float32, which vLLM takes for FP8 and a
reader that keeps scales in the weight's dtype rounds. NVFP4's `weight_global_scale` and `input_global_scale` are
divisors: jpt holds their reciprocals, rounded once, so a divisor may come back as its neighbour (a relative 6e-8).
llm-compressor divides by 7.5 for int4, so that codes reach -8; a scale is any number, so nothing is lost by that.

compressed-tensors 0.19 wrote the files that this was compared with, and with transformers 5.23 loads what is written
here; vLLM (layers/quantization/compressed_tensors) was read in part, SGLang not at all.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jpt.checkpoint.layouts.stored import (
    FLOATS,
    CacheLayout,
    Kept,
    Matrix,
    Reshaped,
    Said,
    Scheme,
    Stored,
    Words,
    Written,
)
from jpt.checkpoint.safetensors import TensorSpec
from jpt.models.cache import CACHE_SCALES
from jpt.quant.formats import Element, Format, Inputs, Scale

VERSION = '0.19.0'
PLACE = 'config.json: quantization_config'
_FIELDS = {'config_groups', 'format', 'ignore', 'kv_cache_scheme', 'quant_method', 'quantization_status', 'version',
           'global_compression_ratio', 'sparsity_config', 'transform_config'}  # fmt: skip
_OF_A_GROUP = {'targets', 'weights', 'input_activations', 'output_activations', 'format'}
# Every field of weights and activations, with what it has where nothing is said; those of _FREE change no number.
_ARGS = {
    'num_bits': 8, 'type': 'int', 'symmetric': True, 'group_size': None, 'strategy': None, 'block_structure': None,
    'dynamic': False, 'actorder': None, 'scale_dtype': None, 'zp_dtype': None, 'observer': None, 'observer_kwargs': {},
}  # fmt: skip
_FREE = {'observer', 'observer_kwargs', 'scale_dtype', 'zp_dtype', 'actorder'}
_ELEMENTS: dict[tuple[Any, Any], Element] = {
    ('float', 8): 'e4m3', ('float', 4): 'e2m1', ('int', 8): 'int8', ('int', 4): 'int4',
}  # fmt: skip
_ONE = Reshaped('one')
_CACHE_ARGS = _ARGS | {'type': 'float', 'strategy': 'tensor'}


class CompressedTensors:
    """See the module."""

    method = 'compressed-tensors'
    cache = CacheLayout({name: Stored(name, name, FLOATS, _ONE, narrow=True) for name in CACHE_SCALES}, implied=False)

    def said(self, given: Mapping[str, Any], beside: Mapping[str, Any] | None) -> Said:
        """What the configs of a directory in this layout say of its weights; ValueError for what is not known."""
        if beside is not None:
            raise ValueError(f'hf_quant_config.json beside quant_method={self.method!r}: expected one of the two')
        unknown = sorted(set(given) - _FIELDS)
        if unknown:
            raise ValueError(f'{PLACE} has fields that jpt does not know: {", ".join(unknown)}')
        for name, allowed in (('quantization_status', ('compressed',)), ('sparsity_config', ({}, None)),
                              ('transform_config', ({}, None))):  # fmt: skip
            if given.get(name, allowed[0]) not in allowed:
                raise ValueError(f'{PLACE}.{name}={given[name]!r}: expected {allowed[0]!r}')
        groups, cache = given.get('config_groups'), given.get('kv_cache_scheme')
        if not isinstance(groups, Mapping) or not (groups or cache):
            raise ValueError(f'{PLACE}.config_groups={groups!r}: expected an object of groups')
        by_target: dict[str, Scheme] = {}
        for name, group in groups.items():
            scheme = _scheme_said(f'{PLACE}.config_groups.{name}', group, given.get('format'))
            by_target |= dict.fromkeys(group['targets'], scheme)

        def scheme_of(module: str, tensors: Mapping[str, TensorSpec]) -> Scheme | None:
            return by_target.get(module) or next(
                (scheme for target, scheme in by_target.items() if _covers(target, module)), by_target.get('Linear')
            )

        return Said(scheme_of, cache is not None, _cache_fault(cache))

    def scheme(self, matrix: Matrix) -> Scheme:
        """How a matrix lies in this layout; ValueError with the reason where it has no place."""
        form, inner = matrix.packing.form, matrix.shape[-1]
        if form.input_columns:
            raise ValueError('holds inputs in the blocks of their weight')
        scheme = _scheme(form)
        if form.columns and inner % form.columns:
            raise ValueError(f'takes multiples of {form.columns} inputs, not {inner}')
        lacking = scheme.lacks(matrix.packing)
        if lacking is not None:
            raise ValueError(lacking)
        return scheme

    def written(self, chosen: Sequence[tuple[Matrix, Scheme]], kept: Kept, cache: bool) -> Written:
        """What the configs of a directory with these matrices say; ValueError where they cannot."""
        modules: dict[Scheme, list[str]] = {}
        for matrix, scheme in chosen:
            modules.setdefault(scheme, []).extend(matrix.modules)
        groups = {
            f'group_{at}': {
                'targets': ['Linear'] if len(modules) == 1 else sorted(names),
                'weights': _weights(scheme.form),
                'input_activations': _inputs(scheme),
                'output_activations': None,
                'format': scheme.label,
            }
            for at, (scheme, names) in enumerate(modules.items())
        }
        labels = {scheme.label for scheme in modules}
        config = {
            'config_groups': groups,
            'format': labels.pop() if len(labels) == 1 else 'mixed-precision' if labels else 'dense',
            'global_compression_ratio': None,
            'ignore': list(kept.linear),
            'kv_cache_scheme': _CACHE_ARGS if cache else None,
            'quant_method': self.method,
            'quantization_status': 'compressed',
            'sparsity_config': {},
            'transform_config': {},
            'version': VERSION,
        }
        return Written(config, {})


def _cache_fault(given: Any) -> str | None:
    """What is wrong with a cache that is not in E4M3 with a scale per tensor."""
    place = f'{PLACE}.kv_cache_scheme'
    try:
        _check_said(place, None if given is None else _said_args(place, given), _CACHE_ARGS)
    except ValueError as error:
        return str(error)
    return None


def _covers(target: str, module: str) -> bool:
    return target.startswith('re:') and re.match(target[3:], module) is not None


def _scheme(form: Format) -> Scheme:
    """How matrices of a format lie.

    Raises:
        ValueError: a format that compressed-tensors does not have.
    """
    alone = form.inputs == 'as_they_are'
    second = form.scale == 'e4m3'
    _weights(form)  # refuses the others
    scale = Stored('scale', 'weight_scale', *_scale_lies(form))
    tensors: tuple[Stored, ...] = (scale,)
    beside = None
    if second:
        label, tensors = 'nvfp4-pack-quantized', (scale, _divisor('scale_2', 'weight_global_scale'))
    elif form.packed and form.element == 'e2m1':
        label = 'mxfp4-pack-quantized'
    elif form.is_mx:
        label = 'mxfp8-quantized'
    elif form.element == 'e4m3':
        label = 'naive-quantized' if alone else 'float-quantized'
    else:
        label = 'pack-quantized' if alone else 'int-quantized'
    if label == 'pack-quantized':
        codes = Stored('codes', 'weight_packed', ('I32',), Words(0x88 if form.packed else 0x80))
        beside = 'weight_shape'
    elif form.packed:
        codes = Stored('codes', 'weight_packed', ('U8',))
    else:
        codes = Stored('codes', 'weight', ('F8_E4M3',) if form.element == 'e4m3' else ('I8',))
    if form.inputs == 'tensor':
        tensors += (Stored('input_scale', 'input_scale', FLOATS, _ONE, narrow=True),)
    elif second and not alone:
        tensors += (_divisor('input_scale', 'input_global_scale'),)
    return Scheme(label, form, (codes, *tensors), beside)


def _divisor(part: str, suffix: str) -> Stored:
    return Stored(part, suffix, FLOATS, _ONE, divisor=True)


def _scale_lies(form: Format) -> tuple[tuple[str, ...], Reshaped, bool]:
    """Of the scales of a format: their dtypes, their order, and whether they are of the weight's dtype."""
    if form.scale == 'e4m3':
        return ('F8_E4M3',), Reshaped(), False
    if form.scale == 'e8m0':
        return ('U8', 'F8_E8M0'), Reshaped(), False
    return FLOATS, _ONE if not (form.rows or form.columns) else Reshaped(), True


def _args(**given: Any) -> dict[str, Any]:
    return _ARGS | given


def _weights(form: Format) -> dict[str, Any]:
    """`weights` of a format.

    Raises:
        ValueError: there is none.
    """
    kind = next(key for key, element in _ELEMENTS.items() if element == form.element)
    found = _args(type=kind[0], num_bits=kind[1])
    if form.scale == 'e4m3' and (form.rows, form.columns) == (1, 16):
        return found | {'strategy': 'tensor_group', 'group_size': 16, 'scale_dtype': 'torch.float8_e4m3fn'}
    if form.scale == 'e8m0' and form.is_mx:
        return found | {'strategy': 'group', 'group_size': 32, 'scale_dtype': 'torch.uint8'}
    if form.scale != 'float32' or form.element == 'e2m1':
        raise ValueError('holds E2M1 in blocks of 16 and 32 alone, and powers of two as bytes for blocks of 32')
    if form.rows == 1 and form.columns:
        return found | {'strategy': 'group', 'group_size': form.columns}
    if form.rows == 1:
        return found | {'strategy': 'channel'}
    if not form.rows and not form.columns:
        return found | {'strategy': 'tensor'}
    if form.rows and form.columns and form.element == 'e4m3':
        return found | {'strategy': 'block', 'block_structure': [form.rows, form.columns]}
    raise ValueError('holds scales per tensor, row, group of a row, and block of E4M3')


def _inputs(scheme: Scheme) -> dict[str, Any] | None:
    """`input_activations` of a format."""
    form = scheme.form
    weights = _weights(form)
    found = _args(type=weights['type'], num_bits=weights['num_bits'], dynamic=True, scale_dtype=weights['scale_dtype'])
    match form.inputs:
        case 'as_they_are':
            return None
        case 'tensor':
            return found | {'strategy': 'tensor', 'dynamic': False}
        case 'token':
            return found | {'strategy': 'token'}
        case 'block' if form.scale == 'e4m3':
            return found | {'strategy': 'tensor_group', 'group_size': form.columns, 'dynamic': 'local'}
        case 'block':
            return found | {'strategy': 'group', 'group_size': form.columns}


def _scheme_said(place: str, group: Any, whole_format: Any) -> Scheme:
    """How the layers of a group lie.

    Raises:
        ValueError: what jpt does not read.
    """
    if not isinstance(group, Mapping) or set(group) - _OF_A_GROUP or not isinstance(group.get('targets'), list):
        raise ValueError(f'{place}={group!r}: expected an object of {", ".join(sorted(_OF_A_GROUP))}')
    for target in group['targets']:
        if target != 'Linear' and '.' not in target and not target.startswith('re:'):
            raise ValueError(f"{place}.targets: {target!r}: expected 'Linear', names of layers, or 're:' and a pattern")
    if group.get('output_activations') is not None:
        raise ValueError(f'{place}.output_activations={group["output_activations"]!r}: expected null')
    weights = _said_args(f'{place}.weights', group.get('weights'))
    given = group.get('input_activations')
    inputs = None if given is None else _said_args(f'{place}.input_activations', given)
    try:
        form = _format_of(weights, inputs)
        scheme = _scheme(form)
    except (ValueError, KeyError) as error:
        raise ValueError(f'{place}: {error}') from error
    _check_said(f'{place}.weights', weights, _weights(form))
    _check_said(f'{place}.input_activations', inputs, _inputs(scheme))
    label = group.get('format') or whole_format
    likewise = {'naive-quantized', 'float-quantized'}
    if label != scheme.label and not {label, scheme.label} <= likewise:
        raise ValueError(f'{place}.format={label!r}: expected {scheme.label!r}')
    return scheme


def _check_said(place: str, said: dict[str, Any] | None, made: dict[str, Any] | None) -> None:
    """Raises ValueError where a field says other than what was made of it."""
    if said is None or made is None:
        return
    for field in sorted(set(_ARGS) - _FREE):
        if said[field] != made[field]:
            raise ValueError(f'{place}.{field}={said[field]!r}: expected {made[field]!r}')


def _said_args(place: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping) or set(given) - set(_ARGS):
        raise ValueError(f'{place}={given!r}: expected an object of {", ".join(_ARGS)}')
    found = _ARGS | dict(given)
    if found['strategy'] is None:
        group = found['group_size']
        found['strategy'] = 'tensor' if group is None else 'channel' if group == -1 else 'group'
    if found['strategy'] == 'channel' and found['group_size'] == -1:
        found['group_size'] = None
    if found['actorder'] not in (None, 'weight', 'static'):  # with these, groups are neighbours all the same
        raise ValueError(f'{place}.actorder={found["actorder"]!r}: expected null, weight or static')
    if found['symmetric'] is not True:
        raise ValueError(f'{place}.symmetric={found["symmetric"]!r}: expected codes around zero')
    return found


def _format_of(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> Format:
    """The format that these say, or nearly: what `_weights` and `_inputs` make of it is compared with them."""
    kind = weights['type'], weights['num_bits']
    if kind not in _ELEMENTS:
        raise ValueError(f'weights of {kind[1]} bits ({kind[0]}): expected one of {sorted(_ELEMENTS)}')
    element, group = _ELEMENTS[kind], weights['group_size'] or 0
    scale: Scale = 'float32'
    rows, columns = 1, 0
    match weights['strategy']:
        case 'tensor':
            rows = 0
        case 'group' | 'tensor_group':
            columns = group
            in_bytes = element == 'e2m1' or weights['scale_dtype'] == 'torch.uint8'
            scale = 'e4m3' if weights['strategy'] == 'tensor_group' else 'e8m0' if in_bytes else 'float32'
        case 'block':
            rows, columns = weights['block_structure']
        case other if other != 'channel':
            raise ValueError(f'weights.strategy={other!r}: expected tensor, channel, group, tensor_group or block')
    kinds: dict[Any, Inputs] = {
        'tensor': 'tensor', 'token': 'token', 'group': 'block', 'tensor_group': 'block', None: 'as_they_are',
    }  # fmt: skip
    strategy = None if inputs is None else inputs['strategy']
    if strategy not in kinds:
        raise ValueError(f'input_activations.strategy={strategy!r}: expected tensor, token, group or tensor_group')
    return Format(element, rows, columns, scale, kinds[strategy])
