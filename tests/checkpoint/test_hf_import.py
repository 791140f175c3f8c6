"""Hugging Face directories: where each tensor goes, what is accepted, and what is refused by name."""

from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from hf_tensors import GPT2, LLAMA, gpt2_tensors, llama_tensors

from jpt.checkpoint.hf_import import HuggingFaceSource, is_hf_directory, iterate_hf, load_hf
from jpt.models.names import get, leaves, put

Write = Callable[..., Path]
Q = 'model.layers.{}.self_attn.q_proj.weight'


def test_every_llama_tensor_is_where_its_name_says(write_hf_dir: Write) -> None:
    tensors = llama_tensors()
    directory = write_hf_dir(LLAMA, tensors)
    cfg, params = load_hf(directory)
    assert (cfg.family, cfg.num_layers, cfg.tied) == ('llama', 3, False)
    assert is_hf_directory(directory)
    (layer,) = params['layers'][0]
    places = {
        'self_attn.q_proj': layer['attn']['q']['kernel'],
        'self_attn.k_proj': layer['attn']['k']['kernel'],
        'self_attn.v_proj': layer['attn']['v']['kernel'],
        'self_attn.o_proj': layer['attn']['out']['kernel'],
        'mlp.gate_proj': layer['mlp']['gate']['kernel'],
        'mlp.up_proj': layer['mlp']['up']['kernel'],
        'mlp.down_proj': layer['mlp']['down']['kernel'],
        'input_layernorm': layer['attn_norm']['scale'],
        'post_attention_layernorm': layer['mlp_norm']['scale'],
    }
    for module, leaf in places.items():
        for number in range(3):
            np.testing.assert_array_equal(leaf[number], tensors[f'model.layers.{number}.{module}.weight'])
    np.testing.assert_array_equal(params['embed']['embedding'], tensors['model.embed_tokens.weight'])
    np.testing.assert_array_equal(params['lm_head']['kernel'], tensors['lm_head.weight'])
    np.testing.assert_array_equal(params['final_norm']['scale'], tensors['model.norm.weight'])
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize('prefix', ['transformer.', ''])
def test_gpt2_is_split_and_transposed_with_or_without_the_prefix(write_hf_dir: Write, prefix: str) -> None:
    tensors = gpt2_tensors()
    stored = {prefix + name.removeprefix('transformer.'): array for name, array in tensors.items()}
    buffers = {
        f'{prefix}h.0.attn.bias': np.ones((1, 1, 16, 16), np.bool_),
        f'{prefix}h.0.attn.masked_bias': np.float32(-1e4),
    }
    directory = write_hf_dir(GPT2, stored | {name: np.asarray(array) for name, array in buffers.items()})
    _, params = load_hf(directory)
    (layer,) = params['layers'][0]
    for number in range(2):
        start = f'transformer.h.{number}.'
        fused, bias = tensors[start + 'attn.c_attn.weight'], tensors[start + 'attn.c_attn.bias']
        for part, name in enumerate('qkv'):
            columns = slice(8 * part, 8 * part + 8)
            np.testing.assert_array_equal(layer['attn'][name]['kernel'][number], fused[:, columns].T)
            np.testing.assert_array_equal(layer['attn'][name]['bias'][number], bias[columns])
        np.testing.assert_array_equal(layer['mlp']['up']['kernel'][number], tensors[start + 'mlp.c_fc.weight'].T)
    np.testing.assert_array_equal(params['positions']['embedding'], tensors['transformer.wpe.weight'])


def test_a_part_of_a_leaf_is_that_part_of_the_whole(write_hf_dir: Write) -> None:
    source = HuggingFaceSource(write_hf_dir(GPT2, gpt2_tensors()))
    for leaf in leaves(source.cfg):
        whole = source.read(leaf, tuple(slice(0, size) for size in leaf.shape))
        assert whole.flags.c_contiguous
        index = tuple(slice(size // 3, max(size // 2, 1)) for size in leaf.shape)
        np.testing.assert_array_equal(source.read(leaf, index), whole[index])


def test_leaves_come_one_by_one_too(write_hf_dir: Write) -> None:
    directory = write_hf_dir(LLAMA, llama_tensors())
    _, params = load_hf(directory)
    found = dict(iterate_hf(directory))
    assert len(found) == len(jax.tree.leaves(params))
    for path, array in found.items():
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(array, get(params, path))


@pytest.mark.parametrize('dtype', [ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_stored_dtypes_are_kept_bit_for_bit(write_hf_dir: Write, dtype: type) -> None:
    tensors = llama_tensors(dtype)
    _, params = load_hf(write_hf_dir(LLAMA, tensors))
    kernel = np.asarray(params['layers'][0][0]['attn']['q']['kernel'])
    assert kernel.dtype == dtype
    assert kernel.tobytes() == b''.join(tensors[Q.format(number)].tobytes() for number in range(3))


def test_leaves_may_have_different_dtypes_but_layers_of_one_leaf_may_not(write_hf_dir: Write) -> None:
    tensors = llama_tensors(ml_dtypes.bfloat16)
    tensors['model.norm.weight'] = tensors['model.norm.weight'].astype(np.float32)
    _, params = load_hf(write_hf_dir(LLAMA, tensors))
    assert params['final_norm']['scale'].dtype == np.float32
    assert params['embed']['embedding'].dtype == ml_dtypes.bfloat16
    tensors[Q.format(1)] = tensors[Q.format(1)].astype(np.float32)
    mixed = write_hf_dir(LLAMA, tensors, 'mixed')
    with pytest.raises(ValueError, match=r'(?s)ask for a dtype:.*layers\.0\.self_attn\.q_proj\.weight: bfloat16'):
        load_hf(mixed)
    _, params = load_hf(mixed, dtype='float32')
    np.testing.assert_array_equal(params['layers'][0][0]['attn']['q']['kernel'][1], tensors[Q.format(1)])


def test_a_cast_happens_only_on_request(write_hf_dir: Write) -> None:
    tensors = llama_tensors()
    directory = write_hf_dir(LLAMA, tensors)
    _, params = load_hf(directory, dtype='bfloat16')
    expected = tensors['lm_head.weight'].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(params['lm_head']['kernel']), expected)
    with pytest.raises(ValueError, match="dtype='float8_e4m3fn': expected one of float32"):
        load_hf(directory, dtype='float8_e4m3fn')


def test_64_bits_are_not_cut_silently(write_hf_dir: Write) -> None:
    directory = write_hf_dir(LLAMA, llama_tensors(np.float64))
    with pytest.raises(ValueError, match=r'embed/embedding is stored as float64, which a jax\.Array holds only with'):
        load_hf(directory)
    assert load_hf(directory, dtype='float32')[1]['lm_head']['kernel'].dtype == np.float32


def test_wrong_tensors_are_named_together(write_hf_dir: Write) -> None:
    tensors = llama_tensors()
    del tensors[Q.format(1)]
    tensors['model.norm.weight'] = np.zeros(9, np.float32)
    tensors['model.layers.0.self_attn.q_norm.weight'] = np.zeros(2, np.float32)
    with pytest.raises(ValueError) as caught:
        load_hf(write_hf_dir(LLAMA, tensors))
    message = str(caught.value)
    assert 'model.layers.1.self_attn.q_proj.weight: missing, expected [8, 8]' in message
    assert 'model.norm.weight: has shape [9], expected [8]' in message
    assert 'model.layers.0.self_attn.q_norm.weight: unexpected, float32[2]' in message
    assert str(write_hf_dir(LLAMA, tensors, 'again').parent) in message


def test_quantized_weights_are_called_so(write_hf_dir: Write) -> None:
    tensors = llama_tensors() | {'model.layers.0.mlp.up_proj.weight_scale_inv': np.ones((1, 1), np.float32)}
    with pytest.raises(ValueError, match='it looks quantized, which is not read'):
        load_hf(write_hf_dir(LLAMA, tensors))


def test_rotary_frequencies_of_old_checkpoints_are_left_aside(write_hf_dir: Write) -> None:
    buffers = {f'model.layers.{n}.self_attn.rotary_emb.inv_freq': np.ones(1, np.float32) for n in range(3)}
    _, params = load_hf(write_hf_dir(LLAMA, llama_tensors() | buffers))
    assert len(jax.tree.leaves(params)) == 12


def test_tied_weights_with_and_without_a_stored_head(write_hf_dir: Write) -> None:
    config, tensors = LLAMA | {'tie_word_embeddings': True}, llama_tensors(tied=True)
    _, absent = load_hf(write_hf_dir(config, tensors, 'absent'))
    head = {'lm_head.weight': tensors['model.embed_tokens.weight'].copy()}
    _, equal = load_hf(write_hf_dir(config, tensors | head, 'equal'))
    assert 'lm_head' not in absent
    jax.tree.map(np.testing.assert_array_equal, absent, equal)
    head['lm_head.weight'][10, 7] += 1
    with pytest.raises(ValueError, match=r'lm_head\.weight differs from model\.embed'):
        load_hf(write_hf_dir(config, tensors | head, 'different'))


def test_an_absent_head_that_is_not_tied_is_missing(write_hf_dir: Write) -> None:
    with pytest.raises(ValueError, match=r'lm_head\.weight: missing, expected \[11, 8\]'):
        load_hf(write_hf_dir(LLAMA, llama_tensors(tied=True)))


def test_a_config_that_is_not_computed_names_the_directory(write_hf_dir: Write, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hf: config\.json: model_type='t5': expected one of"):
        load_hf(write_hf_dir({'model_type': 't5'}, llama_tensors()))
    with pytest.raises(FileNotFoundError, match=r'it has no config\.json'):
        load_hf(tmp_path)
    (tmp_path / 'config.json').write_text('[1]')
    with pytest.raises(ValueError, match='expected a JSON object, found list'):
        load_hf(tmp_path)
    assert not is_hf_directory(tmp_path)


def test_sharded_loading_reads_only_the_parts_that_devices_hold(
    write_hf_dir: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = llama_tensors(ml_dtypes.bfloat16)
    directory = write_hf_dir(LLAMA, tensors)
    source = HuggingFaceSource(directory)
    mesh = jax.make_mesh((4, 2), ('data', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec
    shardings: dict = {}
    for leaf in leaves(source.cfg):
        is_kernel = leaf.stack == 1 and leaf.role == 'kernel'
        put(
            shardings,
            leaf.path,
            jax.sharding.NamedSharding(mesh, spec(None, 'data', 'tensor') if is_kernel else spec()),
        )
    asked: list[tuple[int, ...]] = []
    original = HuggingFaceSource.read

    def read(self, leaf, index):
        array = original(self, leaf, index)
        if leaf.path[-2:] == ('q', 'kernel'):
            asked.append(array.shape)
        return array

    monkeypatch.setattr(HuggingFaceSource, 'read', read)
    _, params = load_hf(directory, shardings=shardings)
    kernel = params['layers'][0][0]['attn']['q']['kernel']
    assert asked == [(3, 2, 4)] * 8
    assert kernel.sharding.spec == spec(None, 'data', 'tensor')
    assert kernel.addressable_shards[0].data.shape == (3, 2, 4)
    np.testing.assert_array_equal(np.asarray(kernel)[2], tensors[Q.format(2)])
    np.testing.assert_array_equal(np.asarray(params['lm_head']['kernel']), tensors['lm_head.weight'])
