"""Mamba-2."""

import math
from collections.abc import Mapping
from typing import Any

from jpt.models.config import LayerKind, ModelConfig, StateSpace, runs_of
from jpt.models.families.dialect import Dialect, Stored
from jpt.models.families.family import Family
from jpt.models.families.fields import ACTIVATION_NAMES, Fields

_IN = Stored('mixer.in_proj', beside=('mamba.gate', 'mamba.x', 'mamba.b', 'mamba.c', 'mamba.dt'))
_CONVS = ('mamba.conv_x', 'mamba.conv_b', 'mamba.conv_c')
MAMBA_LAYER: dict[str, str | Stored] = {
    'mamba_norm': 'norm',
    **dict.fromkeys(_IN.beside, _IN),
    **{f'{conv}.filter': Stored('mixer.conv1d.weight', beside=_CONVS) for conv in _CONVS},
    **{f'{conv}.bias': Stored('mixer.conv1d.bias', beside=_CONVS) for conv in _CONVS},
    'mamba.dt_bias': 'mixer.dt_bias',
    'mamba.a_log': 'mixer.A_log',
    'mamba.skip': 'mixer.D',
    'mamba.norm': 'mixer.norm',
    'mamba.out': 'mixer.out_proj',
}
MAMBA2_DIALECT = Dialect('backbone.embeddings', 'backbone.layers', MAMBA_LAYER, 'backbone.norm_f')
# How weights were first drawn, and how a kernel walks over a sequence.
NO_EFFECT = ('time_step_rank', 'time_step_max', 'time_step_floor', 'rescale_prenorm_residual', 'chunk_size')
# A recurrence has no table of positions; this many is no limit in practice.
UNLIMITED = 2**30
# The fields of a state space that not all families name alike.
SPACE_FIELDS = {'num_heads': 'num_heads', 'head_dim': 'head_dim', 'state_dim': 'state_size', 'activation': 'hidden_act'}


def _read_mamba2(fields: Fields) -> ModelConfig:
    # Codestral Mamba's has norm_before_gate true, and is computed by transformers with the gate first all the same.
    fields.ignore(*NO_EFFECT, 'time_step_min', 'residual_in_fp32', 'norm_before_gate')
    fields.ignore('time_step_init_scheme', 'time_step_scale', 'intermediate_size')
    fields.expect('rms_norm', (True, None))
    width = fields.integer('hidden_size', 4096)
    space = read_space(fields, SPACE_FIELDS, read_step_limits(fields))
    if fields.integer('expand', 2) * width != space.width:
        raise ValueError(
            f'config.json: expand * hidden_size={fields.integer("expand", 2) * width}: expected num_heads * head_dim='
            f'{space.width} (mamba2)'
        )
    return ModelConfig(
        family='mamba2',
        vocab_size=fields.integer('vocab_size', 32768),
        width=width,
        num_heads=1,
        num_kv_heads=1,
        head_dim=width,
        segments=runs_of((LayerKind(mixer='mamba'),) * fields.integer('num_hidden_layers', 64)),
        max_length=UNLIMITED,
        norm_eps=fields.number('layer_norm_epsilon', 1e-5),
        tied=fields.boolean('tie_word_embeddings', False),
        state_space=space,
    )


def read_step_limits(fields: Fields) -> tuple[float, float]:
    """The limits of the step size, of which the upper may be infinite in two spellings."""
    limits = fields.get('time_step_limit') or (0.0, math.inf)
    spelled = [float(each['__float__']) if isinstance(each, dict) else each for each in limits]
    if len(spelled) != 2 or not all(isinstance(each, int | float) for each in spelled):
        raise ValueError(f'config.json: time_step_limit={limits!r}: expected two numbers ({fields.family})')
    return float(spelled[0]), float(spelled[1])


def read_space(fields: Fields, names: Mapping[str, str], steps: tuple[float, float]) -> StateSpace:
    """The state space of a config that has these names for what SPACE_FIELDS lists."""
    return StateSpace(
        num_heads=fields.integer(names['num_heads'], 128),
        head_dim=fields.integer(names['head_dim'], 64),
        groups=fields.integer('n_groups', 8),
        state_dim=fields.integer(names['state_dim'], 128),
        conv_width=fields.integer('conv_kernel', 4),
        activation=fields.choice(names['activation'], ACTIVATION_NAMES, 'silu'),
        bias=fields.boolean('use_bias', False),
        conv_bias=fields.boolean('use_conv_bias', True),
        steps=steps,
    )


def write_space(space: StateSpace, names: Mapping[str, str]) -> dict[str, Any]:
    """What `read_space` reads."""
    shared = {
        'n_groups': space.groups,
        'conv_kernel': space.conv_width,
        'use_bias': space.bias,
        'use_conv_bias': space.conv_bias,
    }
    return shared | {field: getattr(space, name) for name, field in names.items()}


def _write_mamba2(cfg: ModelConfig) -> dict[str, Any]:
    space = cfg.state_space
    assert space is not None
    config = write_space(space, SPACE_FIELDS) | {
        'vocab_size': cfg.vocab_size,
        'hidden_size': cfg.width,
        'num_hidden_layers': cfg.num_layers,
        'expand': space.width // cfg.width,
        'layer_norm_epsilon': cfg.norm_eps,
        'tie_word_embeddings': cfg.tied,
    }
    if space.steps != (0.0, math.inf):
        config['time_step_limit'] = [each if math.isfinite(each) else {'__float__': 'Infinity'} for each in space.steps]
    return config


MAMBA2 = Family('Mamba2ForCausalLM', _read_mamba2, _write_mamba2, MAMBA2_DIALECT)
