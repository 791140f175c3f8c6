"""The transformer against transformers: logits and gradients of the tiny models in tests/golden (see README there)."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jpt.models.config import ModelConfig
from jpt.models.families import config_from_hf, config_to_hf
from jpt.models.names import from_hf, leaves, to_hf
from jpt.models.transformer import forward, unembed

MODELS = pathlib.Path(__file__).parents[1] / 'golden' / 'models'
NAMES = sorted(path.name for path in MODELS.iterdir())
TOLERANCE = 1e-4


def read_config(name: str, file: str = 'config.json') -> dict:
    return json.loads((MODELS / name / file).read_text())


def read_tensors(name: str) -> dict[str, np.ndarray]:
    """All tensors of a directory, read by the safetensors library."""
    return {k: v for file in sorted((MODELS / name).glob('*.safetensors')) for k, v in load_file(file).items()}


def load(name: str) -> tuple[ModelConfig, dict]:
    cfg = config_from_hf(read_config(name))
    return cfg, from_hf(cfg, read_tensors(name))


def loss_and_logits(cfg: ModelConfig, params: dict, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean next-token cross-entropy over all rows, written out; and the logits."""
    logits_BTV = unembed(cfg, params, forward(cfg, params, tokens_BT).hidden_BTD)
    logp_BTV = jax.nn.log_softmax(logits_BTV[:, :-1], axis=-1)
    return -jnp.take_along_axis(logp_BTV, tokens_BT[:, 1:, None], axis=-1).mean(), logits_BTV


@pytest.mark.parametrize('name', NAMES)
def test_logits_and_gradients_equal_those_of_transformers(name):
    golden = np.load(MODELS / name / 'golden.npz')
    cfg, params = load(name)
    with jax.default_matmul_precision('highest'):
        step = jax.jit(jax.value_and_grad(lambda p, t: loss_and_logits(cfg, p, t), has_aux=True))
        (loss, logits), grads = step(params, golden['tokens'])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, golden['logits'], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(loss, golden['loss'], rtol=0, atol=TOLERANCE)

    ours = to_hf(cfg, grads)
    wanted = {key.removeprefix('grad/'): golden[key] for key in golden.files if key.startswith('grad/')}
    assert ours.keys() == wanted.keys()
    global_norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in wanted.values()))
    errors = {}
    for tensor, gradient in wanted.items():
        assert ours[tensor].shape == gradient.shape
        scale = max(np.linalg.norm(gradient), 1e-6 * global_norm)
        errors[tensor] = np.linalg.norm(ours[tensor] - gradient) / scale
    assert {tensor: error for tensor, error in errors.items() if not error <= TOLERANCE} == {}


def test_dynamic_scaling_follows_the_length_of_each_row():
    """Rows of 24, 17, 12 and 9 tokens in one padded batch get what transformers gives to each of them alone."""
    golden = np.load(MODELS / 'llama_dynamic' / 'golden.npz')
    cfg, params = load('llama_dynamic')
    rows = [golden[f'alone_tokens_{i}'] for i in range(4)]
    longest = max(map(len, rows))
    assert {len(row) for row in rows} == {24, 17, 12, 9}
    assert cfg.max_length == 12
    tokens = np.stack([np.pad(row, (0, longest - len(row))) for row in rows])
    segments = np.stack([np.arange(longest) < len(row) for row in rows]).astype(np.int32)
    positions = np.arange(longest, dtype=np.int32)[None] * segments
    with jax.default_matmul_precision('highest'):
        logits = jax.jit(lambda p, *batch: unembed(cfg, p, forward(cfg, p, *batch).hidden_BTD))(
            params, tokens, positions, segments
        )
    for i, row in enumerate(rows):
        np.testing.assert_allclose(logits[i, : len(row)], golden[f'alone_logits_{i}'], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize('name', [name for name in NAMES if (MODELS / name / 'config_legacy.json').exists()])
def test_both_dialects_of_a_config_mean_the_same(name):
    assert config_from_hf(read_config(name, 'config_legacy.json')) == config_from_hf(read_config(name))


def test_gelu_in_a_gemma_config_is_the_tanh_form_in_the_first_generation_only():
    configs = {name: read_config(name) for name in ('gemma', 'gemma2', 'gemma3_text')}
    fields = {'gemma': 'hidden_act', 'gemma2': 'hidden_activation', 'gemma3_text': 'hidden_activation'}
    for name, activation in (('gemma', 'gelu_tanh'), ('gemma2', 'gelu'), ('gemma3_text', 'gelu')):
        assert config_from_hf(configs[name]).activation == 'gelu_tanh'
        cfg = config_from_hf(configs[name] | {fields[name]: 'gelu'})
        assert cfg.activation == activation
        assert config_from_hf(config_to_hf(cfg)) == cfg


def test_attention_scores_of_gpt2_are_scaled_as_its_config_says():
    scales = {}
    for weights, by_layer in ((True, False), (False, False), (True, True), (False, True)):
        fields = {'scale_attn_weights': weights, 'scale_attn_by_inverse_layer_idx': by_layer}
        cfg = config_from_hf(read_config('gpt2') | fields)
        scales[weights, by_layer] = [kind.attention_scale or cfg.scale for kind in cfg.layer_kinds()]
        assert config_from_hf(config_to_hf(cfg)) == cfg
        assert fields.items() <= config_to_hf(cfg).items()
    own = 12**-0.5  # 36 wide, 3 heads
    expected = {
        (True, False): [own, own],
        (False, False): [1, 1],
        (True, True): [own, own / 2],
        (False, True): [1, 0.5],
    }
    assert scales == expected


def test_gemma_writes_a_window_where_no_layer_has_one():
    """transformers makes the mask of windows in any case, and fails without a number."""
    for name in ('gemma2', 'gemma3_text'):
        config = read_config(name)
        cfg = config_from_hf(config | {'layer_types': ['full_attention'] * config['num_hidden_layers']})
        assert config_to_hf(cfg)['sliding_window'] > 0
        assert config_from_hf(config_to_hf(cfg)) == cfg


YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 16, 'rope_theta': 900.0}


def test_gemma_3_hears_truncate_beside_the_kinds_of_attention_only():
    for inner in (True, False):
        for outer in (True, False):
            rope = {'full_attention': YARN | {'truncate': inner}, 'truncate': outer}
            cfg = config_from_hf(read_config('gemma3_text') | {'rope_parameters': rope})
            assert {rope.truncate for rope in cfg.ropes() if rope.kind == 'yarn'} == {outer}
            assert config_from_hf(config_to_hf(cfg)) == cfg
            assert config_to_hf(cfg)['rope_parameters'].get('truncate', True) == outer


@pytest.mark.parametrize(
    'scaling', [{'rope_type': 'linear', 'factor': 7.0}, {'type': 'linear', 'factor': 3.0}], ids=['other', 'older']
)
def test_gemma_3_with_two_dialects_that_disagree_is_an_error(scaling):
    with pytest.raises(ValueError, match='rope_scaling'):
        config_from_hf(read_config('gemma3_text') | {'rope_scaling': scaling})


def test_attention_soft_capping_acts_in_gemma_2_and_not_in_gemma_3():
    """As transformers 5.23 computes: its Gemma 3 has the field and leaves it out of the attention."""
    caps = {
        name: config_from_hf(read_config(name) | {'attn_logit_softcapping': 7.0}).attention_soft_cap
        for name in ('gemma2', 'gemma3_text')
    }
    assert caps == {'gemma2': 7.0, 'gemma3_text': None}


@pytest.mark.parametrize('name', NAMES)
def test_a_written_config_reads_back_equal(name):
    cfg = config_from_hf(read_config(name))
    assert config_from_hf(json.loads(json.dumps(config_to_hf(cfg)))) == cfg


@pytest.mark.parametrize('name', NAMES)
def test_a_written_config_says_what_the_source_said(name):
    """Every field of the source that fixes the computation is written with the same value."""
    source = read_config(name)
    if name == 'gemma3_irregular':  # says what transformers does not hear, and what is therefore not written
        assert source['rope_parameters']['full_attention'].pop('truncate') is False
    if source.get('rope_parameters', {}).get('beta_slow') == 1:  # the default of every yarn, which need not be said
        del source['rope_parameters']['beta_slow']
    if 'mlp' not in source.get('layers_block_type', ['mlp']):  # says the size of an MLP that it does not have
        source.pop('intermediate_size')
    if 'moe' not in source.get('layers_block_type', ['moe']):  # says sizes of experts that it does not have
        source = {key: value for key, value in source.items() if 'expert' not in key and 'topk' not in key}
        source = {key: value for key, value in source.items() if key not in ('moe_intermediate_size', 'n_group')}
        source.pop('routed_scaling_factor')
    written = config_to_hf(config_from_hf(source))
    trained_only = {'attention_dropout', 'attn_pdrop', 'embd_pdrop', 'resid_pdrop', 'initializer_range'}
    fixed = {
        'rope_parameters', 'vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'head_dim',
        'num_attention_heads', 'num_key_value_heads', 'rms_norm_eps', 'tie_word_embeddings', 'attention_bias',
        'mlp_bias', 'layer_types', 'final_logit_softcapping', 'query_pre_attn_scalar', 'n_embd', 'n_head', 'n_layer',
        'n_positions', 'layer_norm_epsilon', 'activation_function', 'model_type', 'architectures',
        'num_local_experts', 'num_experts', 'num_experts_per_tok', 'moe_intermediate_size', 'norm_topk_prob',
        'router_aux_loss_coef', 'n_routed_experts', 'first_k_dense_replace', 'kv_lora_rank', 'q_lora_rank', 'n_group',
        'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim', 'topk_group', 'routed_scaling_factor', 'n_shared_experts',
        'rope_interleave', 'num_nextn_predict_layers', 'swiglu_alpha', 'swiglu_limit',
        'layers_block_type', 'mamba_num_heads', 'mamba_head_dim', 'ssm_state_size', 'n_groups', 'conv_kernel',
        'use_bias', 'use_conv_bias', 'moe_latent_size', 'moe_shared_expert_intermediate_size', 'num_heads',
        'state_size', 'no_rope_layers', 'moe_layers', 'attention_chunk_size', 'use_qk_norm',
        'intermediate_size_mlp',
    }  # fmt: skip
    assert not trained_only & fixed
    for field in sorted(fixed & {key for key, value in source.items() if value is not None}):
        assert written.get(field) == source[field], field
    if 'sliding_attention' in source.get('layer_types', ['sliding_attention']):
        assert written.get('sliding_window') == source.get('sliding_window')


@pytest.mark.parametrize('name', NAMES)
def test_the_names_written_are_exactly_those_of_the_source(name):
    cfg, params = load(name)
    source, written = read_tensors(name), to_hf(cfg, params)
    assert written.keys() == source.keys()
    for tensor, values in source.items():
        assert written[tensor].dtype == values.dtype
        np.testing.assert_array_equal(written[tensor], values)


PUBLISHED = json.loads((MODELS.parent / 'published_configs.json').read_text())


@pytest.mark.parametrize('name', PUBLISHED)
def test_configs_of_published_checkpoints_are_read_and_give_their_number_of_parameters(name):
    """The fields that real files have, and the parameter counts that the Hub shows for their safetensors."""
    cfg = config_from_hf(PUBLISHED[name]['config'])
    assert sum(math.prod(leaf.shape) for leaf in leaves(cfg)) == PUBLISHED[name]['parameters']
    assert config_from_hf(config_to_hf(cfg)) == cfg


# One model of every family: the first in the order of names.
FAMILY_OF = {name: family for family, name in {read_config(name)['model_type']: name for name in NAMES[::-1]}.items()}


@pytest.mark.parametrize(('name', 'family'), FAMILY_OF.items())
@pytest.mark.parametrize(
    'field', [{'mlp_gate_something': True}, {'use_mrope': True}, {'logit_scale': 0.01}, {'qk_layernorm': True}]
)
def test_an_unknown_field_is_an_error_that_names_it_and_the_family(name, family, field):
    with pytest.raises(ValueError, match=rf'(?s)^(?=.*{next(iter(field))})(?=.*\b{family}\b)'):
        config_from_hf(read_config(name) | field)


@pytest.mark.parametrize(('name', 'family'), [(n, f) for n, f in FAMILY_OF.items() if n not in ('gpt2', 'gemma3_text')])
@pytest.mark.parametrize(
    'scaling',
    [
        {'rope_type': 'longrope', 'short_factor': [1.0] * 4, 'long_factor': [2.0] * 4, 'factor': 4.0},
        {'rope_type': 'proportional', 'partial_rotary_factor': 0.5},
        {'rope_type': 'default', 'mrope_section': [1, 1, 2]},
        {'rope_type': 'default', 'partial_rotary_factor': 0.5},
        {'rope_type': 'linear', 'factor': 2.0, 'beta_fast': 32.0},
    ],
    ids=lambda scaling: '-'.join(map(str, scaling))[:40],
)
def test_rotary_scaling_that_jpt_does_not_compute_is_an_error(name, family, scaling):
    new = read_config(name) | {'rope_parameters': scaling}
    old = {key: value for key, value in read_config(name).items() if key != 'rope_parameters'}
    for config in (new, old | {'rope_scaling': scaling}):
        with pytest.raises(ValueError, match='rope_'):
            config_from_hf(config)


@pytest.mark.parametrize(
    ('name', 'change'),
    [
        ('llama', {'hidden_act': 'foo'}),
        ('gemma', {'hidden_act': 'foo'}),
        ('gemma2', {'hidden_activation': 'foo'}),
        ('gpt2', {'activation_function': 'foo'}),
        ('gpt2', {'n_head': 5}),
        ('gpt2', {'add_cross_attention': True}),
        ('gemma2', {'use_bidirectional_attention': True}),
        ('llama', {'model_type': 'mamba'}),
        ('llama', {'pretraining_tp': 2}),
        ('llama', {'num_key_value_heads': 4}),
        ('qwen3', {'layer_types': ['full_attention']}),
        ('gemma2', {'sliding_window': None}),
        ('gemma3_text', {'sliding_window': None}),
        ('mistral', {'attention_bias': True}),
        ('qwen3', {'layer_types': ['full_attention', 'linear_attention']}),
        ('llama', {'partial_rotary_factor': 0.5}),
        ('llama', {'vocab_size': '101'}),
    ],
    ids=lambda value: value if isinstance(value, str) else '-'.join(value),
)
def test_a_value_that_jpt_does_not_compute_is_an_error_that_names_the_field(name, change):
    field = next(iter(change))
    with pytest.raises(ValueError, match={'num_key_value_heads': 'num_kv_heads'}.get(field, field)):
        config_from_hf(read_config(name) | change)


@pytest.mark.parametrize('name', FAMILY_OF)
def test_fields_that_leave_the_computation_alone_are_accepted(name):
    """Dropout too: it acts in training only, and published GPT-2 configs carry 0.1."""
    dropouts = ('attn_pdrop', 'embd_pdrop', 'resid_pdrop') if name == 'gpt2' else ('attention_dropout',)
    config = read_config(name)
    noise = {
        'use_cache': False,
        'transformers_version': '4.51.0',
        '_name_or_path': 'somewhere/else',
        'pad_token_id': 3,
        'initializer_range': 0.1,
        'torch_dtype': 'bfloat16',
        'architectures': None,
        **dict.fromkeys(dropouts, 0.1),
        **({'attention_bias': False} if 'llama' in name or 'mistral' in name else {}),
        **({'sliding_window_size': 4096} if name == 'gemma2' else {}),
    }
    assert config_from_hf(config | noise) == config_from_hf(config)
