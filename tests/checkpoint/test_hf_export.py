"""Exported directories: bit-exact round trips, what config.json says, what travels along."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from hf_tensors import GPT2, LLAMA, gpt2_tensors, llama_tensors

from jpt.checkpoint.hf_export import export_hf, hf_config, tensors_of
from jpt.checkpoint.hf_import import load_hf
from jpt.checkpoint.shards import ShardedReader
from jpt.models.families import config_from_hf

Write = Callable[..., Path]


def assert_same_bits(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    reader = ShardedReader(directory)
    assert set(reader.tensors) == set(tensors)
    for name, array in tensors.items():
        found = reader.view(name)
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes()), name


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize('shard', ['5GB', '1kB'])
def test_a_round_trip_keeps_every_bit(write_hf_dir: Write, tmp_path: Path, dtype: type, shard: str) -> None:
    tensors = llama_tensors(dtype)
    cfg, params = load_hf(write_hf_dir(LLAMA, tensors))
    export_hf(tmp_path / 'out', cfg, params, max_shard_size=shard)
    assert_same_bits(tmp_path / 'out', tensors)
    assert (tmp_path / 'out' / 'model.safetensors').exists() == (shard == '5GB')


def test_fused_and_transposed_weights_come_back_under_canonical_names(write_hf_dir: Write, tmp_path: Path) -> None:
    tensors = gpt2_tensors()
    bare = {name.removeprefix('transformer.'): array for name, array in tensors.items()}
    cfg, params = load_hf(write_hf_dir(GPT2, bare))
    export_hf(tmp_path / 'out', cfg, params)
    assert_same_bits(tmp_path / 'out', tensors)


def test_shards_hold_neighbouring_layers(write_hf_dir: Write, tmp_path: Path) -> None:
    cfg, params = load_hf(write_hf_dir(LLAMA, llama_tensors()))
    export_hf(tmp_path / 'out', cfg, params, max_shard_size=2400)
    weight_map = json.loads((tmp_path / 'out' / 'model.safetensors.index.json').read_text())['weight_map']
    order = [weight_map[name] for name in ('model.embed_tokens.weight', 'model.norm.weight', 'lm_head.weight')]
    layers = [weight_map[f'model.layers.{n}.mlp.up_proj.weight'] for n in range(3)]
    assert [order[0], *layers, *order[1:]] == sorted([order[0], *layers, *order[1:]])
    assert len({weight_map[name] for name in weight_map if 'layers.1.' in name}) <= 2


def test_the_config_is_read_back_and_keeps_harmless_fields(write_hf_dir: Write, tmp_path: Path) -> None:
    source = write_hf_dir(LLAMA | {'torch_dtype': 'bfloat16', 'transformers_version': '4.44.0'}, llama_tensors())
    cfg, params = load_hf(source)
    export_hf(tmp_path / 'out', cfg, params, source_dir=source)
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config_from_hf(config) == cfg
    assert config['architectures'] == ['LlamaForCausalLM']
    assert (config['bos_token_id'], config['eos_token_id'], config['transformers_version']) == (1, 2, '4.44.0')
    assert config['dtype'] == config['torch_dtype'] == 'float32'


def test_tokenizer_generation_config_and_card_travel(write_hf_dir: Write, tmp_path: Path, tokenizer_dir: Path) -> None:
    cfg, params = load_hf(write_hf_dir(LLAMA, llama_tensors()))
    (tokenizer_dir / 'generation_config.json').write_text('{"eos_token_id": [2]}')
    (tokenizer_dir / 'README.md').write_text('---\nlicense: other\n---\nThe model that has this tokenizer.\n')
    export_hf(tmp_path / 'out', cfg, params, source_dir=tokenizer_dir)
    for name in ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json'):
        assert (tmp_path / 'out' / name).read_bytes() == (tokenizer_dir / name).read_bytes()
    card = (tmp_path / 'out' / 'README.md').read_text()
    count = sum(array.size for array in llama_tensors().values())
    assert card.startswith('---\nlibrary_name: transformers\n')
    assert f'llama with {count:,} parameters' in card
    assert 'that has this tokenizer' not in card
    export_hf(tmp_path / 'derived', cfg, params, origin=tokenizer_dir)
    assert (tmp_path / 'derived' / 'README.md').read_text().startswith('---\nlicense: other\n---\n')


def test_special_ids_of_a_model_without_a_source_are_its_tokenizers(
    write_hf_dir: Write, tmp_path: Path, tokenizer_dir: Path
) -> None:
    """Left out, transformers would take its own: 1 and 2 for a Llama."""
    cfg, _ = load_hf(write_hf_dir(LLAMA, llama_tensors()))
    names = ('bos_token_id', 'eos_token_id', 'pad_token_id')
    assert [hf_config(cfg, 'float32', tokenizer_dir)[name] for name in names] == [1, 2, None]
    (tokenizer_dir / 'tokenizer_config.json').write_text('{"eos_token": "a", "pad_token": "<unk>"}')
    assert [hf_config(cfg, 'float32', tokenizer_dir)[name] for name in names] == [None, 3, 0]
    assert [hf_config(cfg, 'float32')[name] for name in names] == [None, None, None]


def test_an_activation_keeps_the_name_that_its_source_gave_it(write_hf_dir: Write, tmp_path: Path) -> None:
    """transformers rounds differently under each of the names."""
    for number, name in enumerate(('gelu_new', 'gelu_pytorch_tanh', 'gelu_fast', 'silu')):
        source = write_hf_dir(LLAMA | {'hidden_act': name}, llama_tensors(), f'hf{number}')
        cfg, _ = load_hf(source)
        assert hf_config(cfg, 'float32', source)['hidden_act'] == name


def test_a_model_that_config_json_cannot_describe_is_not_written(write_hf_dir: Write) -> None:
    cfg, _ = load_hf(write_hf_dir(LLAMA, llama_tensors()))
    with pytest.raises(ValueError, match=r'(?s)config.json of llama cannot say.*logit_soft_cap'):
        hf_config(dataclasses.replace(cfg, logit_soft_cap=30.0), 'float32')


def test_a_cast_on_request_and_its_name_in_the_config(write_hf_dir: Write, tmp_path: Path) -> None:
    tensors = llama_tensors()
    cfg, params = load_hf(write_hf_dir(LLAMA, tensors))
    export_hf(tmp_path / 'out', cfg, params, dtype='bfloat16')
    assert_same_bits(tmp_path / 'out', {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()})
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['dtype'] == 'bfloat16'


def test_sharded_and_padded_parameters_are_exported_whole_and_unpadded(write_hf_dir: Write, tmp_path: Path) -> None:
    tensors = llama_tensors()
    cfg, params = load_hf(write_hf_dir(LLAMA, tensors))
    mesh = jax.make_mesh((8,), ('tensor',), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('tensor'))
    for leaf in (params['embed'], params['lm_head']):
        name, table = next(iter(leaf.items()))
        leaf[name] = jax.device_put(np.pad(np.asarray(table), ((0, 5), (0, 0)), constant_values=9), rows)
    export_hf(tmp_path / 'out', cfg, params)
    assert_same_bits(tmp_path / 'out', tensors)


def test_parameters_of_another_model_are_named(write_hf_dir: Write, tmp_path: Path) -> None:
    cfg, params = load_hf(write_hf_dir(LLAMA, llama_tensors()))
    params['lm_head'] = {'kernel': params['lm_head']['kernel'][:, :4], 'bias': np.zeros(11, np.float32)}
    del params['final_norm']
    with pytest.raises(ValueError, match='the parameters are not those of the llama') as caught:
        export_hf(tmp_path / 'out', cfg, params)
    message = str(caught.value)
    assert 'final_norm/scale: not in the tree' in message
    assert 'lm_head/bias: float32[11] in the tree, not expected' in message
    assert 'lm_head/kernel: float32[11, 4] in the tree, expected float32[11, 8]' in message
    assert not (tmp_path / 'out').exists()


def test_an_existing_directory_is_left_alone(write_hf_dir: Write) -> None:
    directory = write_hf_dir(LLAMA, llama_tensors())
    cfg, params = load_hf(directory)
    before = sorted(path.name for path in directory.iterdir())
    with pytest.raises(FileExistsError, match='exists already'):
        export_hf(directory, cfg, params)
    assert sorted(path.name for path in directory.iterdir()) == before


def test_every_tensor_of_the_model_is_written_once(write_hf_dir: Write) -> None:
    cfg, _ = load_hf(write_hf_dir(GPT2, gpt2_tensors()))
    parts = tensors_of(cfg)
    assert set(parts) == set(gpt2_tensors())
    assert [part.source.first for part in parts['transformer.h.1.attn.c_attn.weight']] == [0, cfg.width, 2 * cfg.width]
    assert hf_config(cfg, 'float32')['n_layer'] == 2
