"""The layout of ModelOpt's unified checkpoints: `quant_method` 'modelopt', and hf_quant_config.json beside config.json.

A `quant_algo` says what all quantized layers are, or MIXED_PRECISION, with one per layer in `quantized_layers`. Scales
are multipliers in float32 but for MXFP8 (exponents' bytes) and NVFP4 (E4M3, relative to `weight_scale_2`). Blocks of
128 x 128 have scales [n, 1, m, 1], or no axes where a matrix is one block. INT4 packs rows two by two. nvidia-modelopt
0.47 (torch/export) wrote the files that this was compared with. vLLM (layers/quantization/modelopt.py) was read, not
run, and so was SGLang in an older version, for FP8. vLLM has FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO (sides that 128
divides, scales of four axes), NVFP4, W4A16_NVFP4, MXFP8, and of the mixed ones FP8, NVFP4 and W4A16_NVFP4; it has no
W4A16_AWQ, W8A16 and W8A8.

A weight of blocks that ModelOpt rounds, it rounds alone: vLLM rounds the inputs of FP8_PB_WO too.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jpt import __version__
from jpt.checkpoint.layouts.stored import (
    FLOATS,
    Axes,
    CacheLayout,
    Kept,
    Matrix,
    PairedRows,
    Reshaped,
    Said,
    Scheme,
    Stored,
    Written,
)
from jpt.models.cache import CACHE_SCALES
from jpt.quant.formats import Format

QUANT_FILE = 'hf_quant_config.json'
MIXED = 'MIXED_PRECISION'
PRODUCER = {'name': 'jpt', 'version': __version__}
_FIELDS = {'quant_algo', 'kv_cache_quant_algo', 'exclude_modules', 'quantized_layers'}
_OF_A_LAYER = {'quant_algo', 'group_size', 'has_zero_point', 'pre_quant_scale'}
_IN_CONFIG = {'config_groups', 'ignore', 'quant_algo', 'kv_cache_scheme', 'producer', 'quant_method'}
_CACHE = {'dynamic': False, 'num_bits': 8, 'type': 'float'}

_E4M3 = Stored('codes', 'weight', ('F8_E4M3',))
_INT8 = Stored('codes', 'weight', ('I8',))
_PAIRS = Stored('codes', 'weight', ('U8',))
_PAIRED_ROWS = Stored('codes', 'weight', ('U8',), PairedRows())
_SCALAR = Reshaped('scalar')
_INPUT = Stored('input_scale', 'input_scale', FLOATS, _SCALAR)
_SECOND = Stored('scale_2', 'weight_scale_2', FLOATS, _SCALAR)
_FACTOR = Stored('input_factor', 'pre_quant_scale', FLOATS, narrow=True, optional=True)


def _scale(axes: Axes = 'same', dtypes: tuple[str, ...] = FLOATS) -> Stored:
    return Stored('scale', 'weight_scale', dtypes, Reshaped(axes))


def _cache_scale(name: str) -> Stored:
    return Stored(name, f'{name[0]}_proj.{name}', FLOATS, _SCALAR)


_NVFP4 = (_PAIRS, _scale(dtypes=('F8_E4M3',)), _SECOND)
# The number is of columns that share a scale, where they do: group_size.
ALGORITHMS: dict[str, Callable[[int], Scheme]] = {
    'FP8': lambda _: Scheme('FP8', Format('e4m3', inputs='tensor'), (_E4M3, _scale('scalar'), _INPUT)),
    'FP8_PER_CHANNEL_PER_TOKEN': lambda _: Scheme(
        'FP8_PER_CHANNEL_PER_TOKEN', Format('e4m3', 1, inputs='token'), (_E4M3, _scale('rows'))
    ),
    'fp8_pb_wo': lambda _: Scheme('fp8_pb_wo', Format('e4m3', 128, 128), (_E4M3, _scale('blocks'))),
    'MXFP8': lambda group: Scheme(
        'MXFP8', Format('e4m3', 1, group, 'e8m0', 'block'), (_E4M3, _scale(dtypes=('U8', 'F8_E8M0')))
    ),
    'NVFP4': lambda group: Scheme('NVFP4', Format('e2m1', 1, group, 'e4m3', 'block'), (*_NVFP4, _INPUT)),
    'NVFP4_AWQ': lambda group: Scheme(
        'NVFP4_AWQ', Format('e2m1', 1, group, 'e4m3', 'block'), (*_NVFP4, _INPUT, _FACTOR)
    ),
    'W4A16_NVFP4': lambda group: Scheme('W4A16_NVFP4', Format('e2m1', 1, group, 'e4m3'), _NVFP4),
    'W4A16_AWQ': lambda group: Scheme('W4A16_AWQ', Format('int4', 1, group), (_PAIRED_ROWS, _scale(), _FACTOR)),
    'W4A8_AWQ': lambda group: Scheme(
        'W4A8_AWQ', Format('int4', 1, group, 'e4m3_grid', 'tensor'), (_PAIRED_ROWS, _scale(), _SECOND, _INPUT, _FACTOR)
    ),
    'W8A16': lambda _: Scheme('W8A16', Format('int8', 1), (_INT8, _scale('rows'))),
    'W8A8_SQ_PER_CHANNEL': lambda _: Scheme(
        'W8A8_SQ_PER_CHANNEL', Format('int8', 1, inputs='tensor'), (_INT8, _scale('rows'), _INPUT, _FACTOR)
    ),
}
GROUPS = {'MXFP8': 32, 'NVFP4': 16, 'NVFP4_AWQ': 16, 'W4A16_NVFP4': 16, 'W4A16_AWQ': 128, 'W4A8_AWQ': 128}
_ANY_GROUP = ('W4A16_AWQ', 'W4A8_AWQ')
_WITH_FACTOR = ('W4A16_AWQ', 'W4A8_AWQ', 'NVFP4_AWQ')
_BY_UPPER = {name.upper(): name for name in ALGORITHMS}


class ModelOpt:
    """See the module."""

    method = 'modelopt'
    cache = CacheLayout({name: _cache_scale(name) for name in CACHE_SCALES}, implied=True)

    def said(self, given: Mapping[str, Any], beside: Mapping[str, Any] | None) -> Said:
        """What the configs of a directory in this layout say of its weights; ValueError for what is not known."""
        inner: Mapping[str, Any] = {}
        fault = None
        if beside is not None:
            inner = beside.get('quantization', {})
            if set(beside) - {'producer', 'quantization'} or not isinstance(inner, Mapping):
                raise ValueError(f'{QUANT_FILE}: expected an object of producer and quantization')
            _check_fields(QUANT_FILE, inner, _FIELDS | _OF_A_LAYER)
            found = _layers(QUANT_FILE, inner)
            cached = inner.get('kv_cache_quant_algo')
            fault = _cache_fault(f'{QUANT_FILE}.kv_cache_quant_algo', cached, 'FP8')
        if given:
            place = 'config.json: quantization_config'
            _check_fields(place, given, _IN_CONFIG | _OF_A_LAYER | {'quantized_layers'})
            other = _layers(place, _with_group(given, inner))
            cache = given.get('kv_cache_scheme')
            if beside is not None and (other != found or (cached is None) != (cache is None)):
                raise ValueError(f'{QUANT_FILE} and {place} say different things')
            found, cached = other, cache
            fault = fault or _cache_fault(f'{place}.kv_cache_scheme', cache, _CACHE)
        every, by_name = found
        return Said(lambda module, tensors: by_name.get(module, every), cached is not None, fault, frozenset(by_name))

    def scheme(self, matrix: Matrix) -> Scheme:
        """How a matrix lies in this layout; ValueError with the reason where it has no place."""
        form, (out, inner) = matrix.packing.form, matrix.shape
        reasons = []
        for name, build in ALGORITHMS.items():
            scheme = build(form.columns or GROUPS.get(name, 0))
            if scheme.form != form or not _may_have(name, form.columns):
                continue
            lacking = scheme.lacks(matrix.packing)
            if lacking is None and form.columns and form.rows == 1 and inner % form.columns:
                lacking = f'{name} takes multiples of {form.columns} inputs, not {inner}'
            if lacking is None and scheme.of('codes').order.rows > 1 and out % 2:
                lacking = f'{name} packs rows two by two, and there are {out}'
            if lacking is None:
                return scheme
            reasons.append(lacking)
        raise ValueError('; '.join(reasons) or f'has {", ".join(ALGORITHMS)}')

    def written(self, chosen: Sequence[tuple[Matrix, Scheme]], kept: Kept, cache: bool) -> Written:
        """What the configs of a directory with these matrices say; ValueError where they cannot."""
        factor = any(matrix.packing.input_factor for matrix, _ in chosen)
        layers = {name: _settings(scheme, factor) for matrix, scheme in chosen for name in matrix.modules}
        different = [dict(pairs) for pairs in dict.fromkeys(tuple(each.items()) for each in layers.values())]
        inner: dict[str, Any] = {'quant_algo': MIXED, 'kv_cache_quant_algo': 'FP8' if cache else None}
        config: dict[str, Any] = {'kv_cache_scheme': _CACHE} if cache else {}
        ignored: list[str] = []
        if not different:  # the cache alone
            inner |= {'quant_algo': None, 'quantized_layers': {}}
        elif len(different) > 1:
            inner['quantized_layers'] = config['quantized_layers'] = layers
            config['config_groups'] = {
                f'group_{at}': _group(one) | {'targets': sorted(name for name in layers if layers[name] == one)}
                for at, one in enumerate(different)
            }
        else:
            ignored = sorted({*kept.linear, *kept.embeddings})
            inner |= different[0] | {'exclude_modules': ignored}
            if inner['quant_algo'] in _GROUPED:
                config['config_groups'] = {'group_0': _group(different[0]) | {'targets': ['Linear']}}
        config |= {'ignore': ignored, 'producer': PRODUCER}
        if different:
            config['quant_algo'] = inner['quant_algo']
        files = {QUANT_FILE: {'producer': PRODUCER, 'quantization': inner}}
        return Written(config | {'quant_method': self.method}, files)


_GROUPED = ('FP8', 'NVFP4', 'W4A16_NVFP4')  # the ones of which config.json has config_groups where all layers are so


def _cache_fault(place: str, given: Any, wanted: Any) -> str | None:
    """What is wrong with a cache that is not in E4M3."""
    return None if given in (None, wanted) else f'{place}={given!r}: expected {wanted!r} or null'


def _check_fields(place: str, given: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(f'{place} has fields that jpt does not know: {", ".join(unknown)}')


def _with_group(given: Mapping[str, Any], beside: Mapping[str, Any]) -> Mapping[str, Any]:
    """quantization_config with its group_size, which may stand in one of its config_groups or in the other file."""
    groups = given.get('config_groups') or {}
    sizes = [group.get('weights', {}).get('group_size') for group in groups.values()]
    known = [size for size in (given.get('group_size'), *sizes, beside.get('group_size')) if size is not None]
    return {**given, 'group_size': known[0]} if known else given


def _may_have(name: str, group: int) -> bool:
    """Whether so many columns may share a scale."""
    return name not in GROUPS or name in _ANY_GROUP or group == GROUPS[name]


def _layers(place: str, given: Mapping[str, Any]) -> tuple[Scheme | None, dict[str, Scheme]]:
    """The scheme of all layers, or that of each."""
    algo = given.get('quant_algo')
    if algo != MIXED:
        return (None if algo is None else _scheme_of(place, given)), {}
    layers = given.get('quantized_layers')
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(f'{place}.quantized_layers={layers!r}: expected the layers of {MIXED} with a quant_algo each')
    found = {}
    for name, each in layers.items():
        here = f'{place}.quantized_layers.{name}'
        if not isinstance(each, Mapping) or set(each) - _OF_A_LAYER:
            raise ValueError(f'{here}={each!r}: expected an object of {", ".join(sorted(_OF_A_LAYER))}')
        found[name] = _scheme_of(here, each)
    return None, found


def _scheme_of(place: str, given: Mapping[str, Any]) -> Scheme:
    algo = given['quant_algo']
    name = _BY_UPPER.get(str(algo).upper())
    if name is None:
        raise ValueError(f'{place}.quant_algo={algo!r}: expected one of {", ".join((*ALGORITHMS, MIXED))}')
    if given.get('has_zero_point'):
        raise ValueError(f'{place}.has_zero_point=True: expected codes around zero')
    group = given.get('group_size')
    if name in GROUPS:
        group = GROUPS[name] if group is None else group
        if not isinstance(group, int) or group < 1 or not _may_have(name, group):
            raise ValueError(f'{place}.group_size={group!r}: expected {GROUPS[name]} ({name})')
    return ALGORITHMS[name](group or 0)


def _settings(scheme: Scheme, factor: bool) -> dict[str, Any]:
    """What hf_quant_config.json says of a layer; `factor`: whether any has a pre_quant_scale."""
    found: dict[str, Any] = {'quant_algo': scheme.label}
    if scheme.label in GROUPS:
        found['group_size'] = scheme.form.columns
    if scheme.label in _WITH_FACTOR:
        found |= {'has_zero_point': False, 'pre_quant_scale': factor}
    return found


def _group(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What config_groups of config.json says of layers with these settings."""
    form = ALGORITHMS[settings['quant_algo']](settings.get('group_size', 0)).form
    shared = {'group_size': settings['group_size']} if 'group_size' in settings else {}
    bits = 4 if form.packed else 8
    kind = 'int' if form.element in ('int8', 'int4') else 'float'
    weights: dict[str, Any] = {'dynamic': False, 'num_bits': bits, 'type': kind}
    inputs = {**weights, **shared}
    strategy = {'strategy': 'channel'} if form.rows == 1 and not form.columns and form.inputs != 'as_they_are' else {}
    return {
        **({} if form.inputs == 'as_they_are' else {'input_activations': inputs}),
        'weights': {**weights, **strategy, **shared},
    }
