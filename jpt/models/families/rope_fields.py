"""The rotary embedding in a Hugging Face config.json: `rope_theta` and `rope_scaling`, or `rope_parameters`."""

from collections.abc import Mapping
from typing import Any

from jpt.models.config import Rope
from jpt.models.families.fields import Fields

LAYER_TYPES = ('sliding_attention', 'full_attention')
# What each kind may say beside its base, as transformers validates it: required fields, then optional ones.
KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    'default': ((), ()),
    'linear': (('factor',), ()),
    'dynamic': (('factor',), ('original_max_position_embeddings',)),
    'yarn': (
        ('factor',),
        (
            'original_max_position_embeddings',
            'attention_factor',
            'beta_fast',
            'beta_slow',
            'mscale',
            'mscale_all_dim',
            'truncate',
        ),
    ),
    'llama3': (('factor', 'low_freq_factor', 'high_freq_factor'), ('original_max_position_embeddings',)),
}


def read_rope(fields: Fields, max_length: int, default_theta: float = 10_000.0) -> Rope:
    """The rotary embedding that all layers share, from either dialect.

    Raises:
        ValueError: an unknown kind of scaling, or a field that the kind does not take.
    """
    theta = fields.number('rope_theta', default_theta)
    fields.expect('partial_rotary_factor', (None, 1.0))
    old, new = fields.get('rope_scaling'), fields.get('rope_parameters')
    rope = _parse(new or old or {}, 'rope_parameters' if new else 'rope_scaling', theta, max_length)
    if new and old and _parse(old, 'rope_scaling', theta, max_length) != rope:
        raise ValueError(f'config.json: rope_scaling={old} contradicts rope_parameters={new}')
    return rope


def read_ropes_by_layer(fields: Fields, max_length: int) -> dict[str, Rope]:
    """The rotary embeddings of Gemma 3, one per kind of attention, from either dialect.

    Raises:
        ValueError: as `read_rope`, and where the dialects contradict each other.
    """
    bases = {
        'sliding_attention': fields.number('rope_local_base_freq', 10_000.0),
        'full_attention': fields.number('rope_theta', 1_000_000.0),
    }
    new, old = dict(fields.get('rope_parameters') or {}), fields.get('rope_scaling') or {}
    # transformers reads this field of yarn beside the kinds of attention, and not the one within them.
    truncate = new.pop('truncate', True)
    unknown = sorted(set(new) - set(LAYER_TYPES))
    if unknown:
        raise ValueError(f'config.json: rope_parameters has {unknown}: expected {" and ".join(LAYER_TYPES)}')
    ropes = {}
    for name in LAYER_TYPES:
        values = dict(new.get(name) or {})
        if name == 'full_attention' and old:
            if 'rope_type' not in old:  # transformers does not see the older name 'type' here
                raise ValueError(f'config.json: rope_scaling={old}: expected a rope_type')
            both = values | old
            if values and _parse(both, 'rope_scaling', bases[name], max_length) != _parse(
                values, 'rope_parameters', bases[name], max_length
            ):
                raise ValueError(f'config.json: rope_scaling={old} contradicts rope_parameters={new}')
            values = both
        if values.get('rope_type', values.get('type')) == 'yarn':
            values['truncate'] = truncate
        ropes[name] = _parse(values, f'rope_parameters.{name}', bases[name], max_length)
    return ropes


def _parse(values: Mapping[str, Any], place: str, theta: float, max_length: int) -> Rope:
    values = {name: value for name, value in values.items() if value is not None}
    kind = values.pop('rope_type', values.pop('type', 'default'))
    values.pop('type', None)
    if kind not in KEYS:
        raise ValueError(f'config.json: {place}: rope_type={kind!r}: expected one of {", ".join(KEYS)}')
    theta = float(values.pop('rope_theta', theta))
    if values.pop('partial_rotary_factor', 1.0) != 1.0:
        raise ValueError(f'config.json: {place}: partial_rotary_factor: expected 1.0')
    required, optional = KEYS[kind]
    for name in required:
        # DeepSeek's form leaves the factor of yarn to be the ratio of the two lengths.
        if name not in values and not (kind == 'yarn' and 'original_max_position_embeddings' in values):
            raise ValueError(f'config.json: {place}: {kind} needs {name}')
    unknown = sorted(set(values) - set(required) - set(optional))
    if unknown:
        raise ValueError(f'config.json: {place}: {kind} does not take {unknown}')
    # transformers computes 'dynamic' from max_position_embeddings, whatever else the field says.
    original = max_length if kind == 'dynamic' else int(values.pop('original_max_position_embeddings', max_length))
    values.pop('original_max_position_embeddings', None)
    if kind in ('default', 'linear'):
        original = 0
    if kind == 'yarn':
        values.setdefault('factor', max_length / original)
    return Rope(theta, kind, original_length=original, **_typed(values))


def _typed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value if name == 'truncate' else float(value) for name, value in values.items()}


def write_rope(rope: Rope | None) -> dict[str, Any]:
    """The fields of one rotary embedding, in both dialects."""
    if rope is None:
        return {}
    values: dict[str, Any] = {'rope_type': rope.kind}
    required, optional = KEYS[rope.kind]
    plain = Rope()
    for name in required:
        values[name] = getattr(rope, name)
    for name in optional:
        if name == 'original_max_position_embeddings':
            if rope.kind != 'dynamic':
                values[name] = rope.original_length
        elif getattr(rope, name) != getattr(plain, name):
            values[name] = getattr(rope, name)
    return {
        'rope_parameters': {**values, 'rope_theta': rope.theta},
        'rope_theta': rope.theta,
        'rope_scaling': None if rope.kind == 'default' else values,
    }


def write_ropes_by_layer(ropes: Mapping[str, Rope | None]) -> dict[str, Any]:
    """The fields of Gemma 3's rotary embeddings by kind of attention, in both dialects; its defaults for what lacks."""
    kept = {'sliding_attention': Rope(1e4), 'full_attention': Rope(1e6)}
    kept |= {name: rope for name, rope in ropes.items() if rope is not None}
    written: dict[str, Any] = {name: write_rope(rope)['rope_parameters'] for name, rope in kept.items()}
    bases = {name: values['rope_theta'] for name, values in written.items()}
    truncate = [values.pop('truncate', True) for values in written.values()]
    scaling = {name: value for name, value in written['full_attention'].items() if name != 'rope_theta'}
    return {
        'rope_parameters': written if all(truncate) else {**written, 'truncate': False},
        'rope_theta': bases['full_attention'],
        'rope_local_base_freq': bases['sliding_attention'],
        'rope_scaling': None if scaling['rope_type'] == 'default' else scaling,
    }
