"""Hugging Face directories in and out, on the tiny models of tests/golden; the safetensors library is the witness."""

import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jpt.checkpoint.hf_export import export_hf
from jpt.checkpoint.hf_import import load_hf
from jpt.models.families import config_from_hf
from jpt.models.names import from_hf, to_hf

MODELS = pathlib.Path(__file__).parents[1] / 'golden' / 'models'
NAMES = sorted(path.name for path in MODELS.iterdir())
# One of each way in which tensors are named or laid out.
LAYOUTS = ('llama_bias', 'llama_tied', 'mistral', 'qwen2', 'qwen3', 'gemma', 'gemma2', 'gemma3_text', 'gpt2')


def read_tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a directory, read by the safetensors library; no tensor may be in two files."""
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(directory.glob('*.safetensors')):
        found = load_file(file)
        assert not tensors.keys() & found.keys()
        tensors |= found
    return tensors


def assert_same_bytes(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape), name
        assert found[name].tobytes() == values.tobytes(), name


def copy_of(name: str, to: pathlib.Path, tensors: dict[str, np.ndarray] | None = None, **config) -> pathlib.Path:
    """A golden directory with other tensors or config fields, in one safetensors file."""
    to.mkdir()
    content = json.loads((MODELS / name / 'config.json').read_text()) | config
    (to / 'config.json').write_text(json.dumps(content))
    save_file(read_tensors(MODELS / name) if tensors is None else tensors, to / 'model.safetensors')
    return to


@pytest.mark.parametrize('name', NAMES)
def test_the_round_trip_is_bit_exact_and_keeps_names_config_and_generation_config(name, tmp_path):
    source = MODELS / name
    cfg, params = load_hf(source)
    assert cfg == config_from_hf(json.loads((source / 'config.json').read_text()))
    expected = from_hf(cfg, read_tensors(source))
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(expected)))

    export_hf(tmp_path / 'out', cfg, params, source_dir=source)
    assert_same_bytes(read_tensors(tmp_path / 'out'), read_tensors(source))
    generation = 'generation_config.json'
    assert json.loads((tmp_path / 'out' / generation).read_text()) == json.loads((source / generation).read_text())
    written = json.loads((tmp_path / 'out' / 'config.json').read_text())
    before = json.loads((source / 'config.json').read_text())
    for field in ('bos_token_id', 'eos_token_id', 'pad_token_id', 'model_type', 'architectures', 'dtype'):
        assert written.get(field) == before.get(field), field

    again, params_again = load_hf(tmp_path / 'out')
    assert again == cfg
    assert_same_bytes(to_hf(again, params_again), read_tensors(source))


@pytest.mark.parametrize('name', ['qwen2', 'qwen3', 'gpt2', 'gemma3_text'])
def test_shards_hold_every_tensor_once_and_the_index_says_where(name, tmp_path):
    cfg, params = load_hf(MODELS / name)
    export_hf(tmp_path / 'out', cfg, params, max_shard_size='40KB')
    files = sorted(path.name for path in (tmp_path / 'out').glob('*.safetensors'))
    assert len(files) > 2
    assert files == [f'model-{i + 1:05d}-of-{len(files):05d}.safetensors' for i in range(len(files))]
    index = json.loads((tmp_path / 'out' / 'model.safetensors.index.json').read_text())
    wanted = read_tensors(MODELS / name)
    assert index['metadata']['total_size'] == sum(values.nbytes for values in wanted.values())
    for file in files:
        in_file = load_file(tmp_path / 'out' / file)
        assert in_file.keys() == {tensor for tensor, where in index['weight_map'].items() if where == file}
    assert_same_bytes(read_tensors(tmp_path / 'out'), wanted)
    assert_same_bytes(to_hf(*load_hf(tmp_path / 'out')), wanted)


@pytest.mark.parametrize('dtype', [ml_dtypes.bfloat16, np.float16], ids=['bfloat16', 'float16'])
def test_half_precision_is_kept_and_a_cast_rounds_to_nearest(dtype, tmp_path):
    tensors = {name: values.astype(dtype) for name, values in read_tensors(MODELS / 'llama_bias').items()}
    source = copy_of('llama_bias', tmp_path / 'half', tensors, dtype=np.dtype(dtype).name)
    cfg, params = load_hf(source)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype)}
    export_hf(tmp_path / 'out', cfg, params, source_dir=source)
    assert_same_bytes(read_tensors(tmp_path / 'out'), tensors)
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['dtype'] == np.dtype(dtype).name
    assert_same_bytes(to_hf(*load_hf(MODELS / 'llama_bias', dtype=dtype)), tensors)


def test_gpt2_as_first_published_is_read_without_prefix_and_with_its_causal_masks(tmp_path):
    tensors = {name.removeprefix('transformer.'): values for name, values in read_tensors(MODELS / 'gpt2').items()}
    for layer in range(2):
        tensors[f'h.{layer}.attn.bias'] = np.tril(np.ones((1, 1, 40, 40), np.float32))
    source = copy_of('gpt2', tmp_path / 'old', tensors)
    assert_same_bytes(to_hf(*load_hf(source)), read_tensors(MODELS / 'gpt2'))


def test_stored_rotary_frequencies_are_not_weights(tmp_path):
    tensors = read_tensors(MODELS / 'llama')
    extra = {f'model.layers.{i}.self_attn.rotary_emb.inv_freq': np.ones(4, np.float32) for i in range(3)}
    source = copy_of('llama', tmp_path / 'old', tensors | extra)
    assert_same_bytes(to_hf(*load_hf(source)), tensors)


@pytest.mark.parametrize('name', ['llama_tied', 'gemma2', 'gpt2'])
def test_a_head_stored_beside_a_tied_embedding_must_equal_it(name, tmp_path):
    tensors = read_tensors(MODELS / name)
    embedding = tensors['transformer.wte.weight' if name == 'gpt2' else 'model.embed_tokens.weight']
    source = copy_of(name, tmp_path / 'both', tensors | {'lm_head.weight': embedding})
    assert_same_bytes(to_hf(*load_hf(source)), tensors)
    other = copy_of(name, tmp_path / 'other', tensors | {'lm_head.weight': embedding + 1})
    with pytest.raises(ValueError, match=r'lm_head\.weight'):
        load_hf(other)


@pytest.mark.parametrize('name', LAYOUTS)
def test_a_missing_extra_or_misshapen_tensor_is_an_error_with_its_name(name, tmp_path):
    tensors = read_tensors(MODELS / name)
    for index, tensor in enumerate(list(tensors)[:: max(1, len(tensors) // 4)]):
        without = {key: values for key, values in tensors.items() if key != tensor}
        pattern = tensor.replace('.', r'\.')
        with pytest.raises(ValueError, match=pattern):
            load_hf(copy_of(name, tmp_path / f'missing{index}', without))
        with pytest.raises(ValueError, match=pattern):
            load_hf(copy_of(name, tmp_path / f'shape{index}', tensors | {tensor: tensors[tensor][:-1]}))
        with pytest.raises(ValueError, match=rf'{pattern}_extra'):
            load_hf(copy_of(name, tmp_path / f'extra{index}', tensors | {f'{tensor}_extra': tensors[tensor]}))


def test_a_layer_too_many_is_named(tmp_path):
    """A config that says fewer layers than the file holds would otherwise truncate the model."""
    with pytest.raises(ValueError, match=r'model\.layers\.2\.'):
        load_hf(copy_of('llama', tmp_path / 'short', num_hidden_layers=2))
    with pytest.raises(ValueError, match=r'model\.layers\.3\.'):
        load_hf(copy_of('llama', tmp_path / 'long', num_hidden_layers=4))


@pytest.mark.parametrize('name', ['qwen2', 'qwen3'])
def test_a_shard_that_is_not_there_is_named(name, tmp_path):
    shutil.copytree(MODELS / name, tmp_path / 'model')
    lost = sorted((tmp_path / 'model').glob('*.safetensors'))[1]
    lost.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=lost.name):
        load_hf(tmp_path / 'model')


def test_pickled_weights_are_refused_by_name(tmp_path):
    directory = tmp_path / 'pickled'
    directory.mkdir()
    shutil.copy(MODELS / 'llama' / 'config.json', directory)
    (directory / 'pytorch_model.bin').write_bytes(b'')
    with pytest.raises((ValueError, FileNotFoundError), match=r'pytorch_model\.bin'):
        load_hf(directory)


def test_a_config_that_jpt_does_not_compute_is_refused_with_the_place(tmp_path):
    with pytest.raises(ValueError, match=r'strange.*use_mrope'):
        load_hf(copy_of('qwen2', tmp_path / 'strange', use_mrope=True))
