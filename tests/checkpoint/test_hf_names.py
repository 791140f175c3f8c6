"""Names of published tensors: older ones, copies, heads that configs leave unsaid, and parts that are not text."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from hf_tensors import BERT, LLAMA, Tensors, bert_tensors, llama_tensors, random_tensors
from safetensors.numpy import load_file

from jpt.checkpoint.hf_export import export_hf
from jpt.checkpoint.hf_import import HuggingFaceSource, load_hf
from jpt.checkpoint.hf_names import LeftOut
from jpt.models.names import to_hf

Write = Callable[..., Path]
DECODER, BIAS = 'cls.predictions.decoder', 'cls.predictions.bias'


def older(tensors: Tensors) -> Tensors:
    """The same under the names of the first releases."""
    return {
        re.sub(r'LayerNorm\.bias$', 'LayerNorm.beta', re.sub(r'LayerNorm\.weight$', 'LayerNorm.gamma', name)): array
        for name, array in tensors.items()
    }


def assert_holds(directory: Path, wanted: Tensors) -> None:
    """The model has these tensors under today's names, loaded and exported, and no others."""
    cfg, params = load_hf(directory)
    export_hf(directory.parent / 'out', cfg, params)
    for found in (to_hf(cfg, params), load_file(directory.parent / 'out' / 'model.safetensors')):
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array)


def test_bert_as_its_first_release_stores_it(write_hf_dir: Write) -> None:
    """Older names, a pooler that the config does not name, a buffer, and the tied head once more."""
    tensors = bert_tensors()
    stored = older(tensors) | {
        'bert.embeddings.position_ids': np.arange(16)[None],
        DECODER + '.weight': tensors['bert.embeddings.word_embeddings.weight'].copy(),
        DECODER + '.bias': tensors[BIAS].copy(),
    }
    assert sum(name.endswith(('.gamma', '.beta')) for name in stored) == 12
    directory = write_hf_dir(BERT, stored)
    assert_holds(directory, tensors)
    written = json.loads((directory.parent / 'out' / 'config.json').read_text())
    assert written['architectures'] == ['BertForPreTraining']


def test_a_pooler_is_there_where_the_config_or_a_tensor_says_so(write_hf_dir: Write) -> None:
    assert 'pooler' not in load_hf(write_hf_dir(BERT, bert_tensors(pooled=False), 'plain'))[1]
    half = bert_tensors()
    del half['bert.pooler.dense.weight'], half['bert.pooler.dense.bias']
    with pytest.raises(ValueError, match=r'bert\.pooler\.dense\.weight: missing'):
        load_hf(write_hf_dir(BERT, half, 'half'))
    says = BERT | {'architectures': ['BertForPreTraining']}
    with pytest.raises(ValueError, match=r'cls\.seq_relationship\.weight: missing'):
        load_hf(write_hf_dir(says, bert_tensors(pooled=False), 'says'))


@pytest.mark.parametrize('copy', [DECODER + '.weight', DECODER + '.bias'])
def test_a_copy_that_differs_is_refused(write_hf_dir: Write, copy: str) -> None:
    tensors = bert_tensors()
    original = tensors['bert.embeddings.word_embeddings.weight' if copy.endswith('weight') else BIAS]
    with pytest.raises(ValueError, match=f'{re.escape(copy)} differs from'):
        load_hf(write_hf_dir(BERT, tensors | {copy: original + 1}))


def test_a_copy_alone_is_the_tensor(write_hf_dir: Write) -> None:
    tensors = bert_tensors()
    stored = tensors | {DECODER + '.bias': tensors[BIAS]}
    del stored[BIAS]
    assert_holds(write_hf_dir(BERT, stored), tensors)


@pytest.mark.parametrize('twin', ['absent', 'unused', 'alone'])
def test_bert_with_a_head_of_its_own(write_hf_dir: Write, twin: str) -> None:
    """transformers 5 stores two biases then, and computes with the decoder's; older files have the other."""
    tensors = bert_tensors(tied=False)
    stored = dict(tensors)
    if twin == 'unused':
        stored[BIAS] = tensors[DECODER + '.bias'] + 1
    if twin == 'alone':
        stored[BIAS] = stored.pop(DECODER + '.bias')
    directory = write_hf_dir(BERT | {'tie_word_embeddings': False}, stored)
    assert_holds(directory, tensors)
    assert not load_hf(directory.parent / 'out')[0].tied


def test_one_tensor_under_two_names_is_refused(write_hf_dir: Write) -> None:
    tensors = bert_tensors()
    twice = tensors | {'bert.embeddings.LayerNorm.gamma': tensors['bert.embeddings.LayerNorm.weight']}
    with pytest.raises(
        ValueError, match=r'LayerNorm\.(weight|gamma) and bert\.embeddings\.LayerNorm\.\w+ are two names'
    ):
        load_hf(write_hf_dir(BERT, twice))


def test_unknown_tensors_of_an_encoder_are_still_errors(write_hf_dir: Write) -> None:
    extra = {'classifier.weight': np.zeros((2, 8), np.float32)}
    with pytest.raises(ValueError, match=r'classifier\.weight: unexpected'):
        load_hf(write_hf_dir(BERT, bert_tensors() | extra))


TEXT = {'model_type': 'gemma3_text', 'vocab_size': 11, 'hidden_size': 8, 'intermediate_size': 12, 'head_dim': 4}
TEXT |= {'num_hidden_layers': 1, 'num_attention_heads': 2, 'num_key_value_heads': 1, 'sliding_window': 4}
VISION = {'model_type': 'siglip_vision_model', 'hidden_size': 6}
GEMMA3 = {'model_type': 'gemma3', 'architectures': ['Gemma3ForConditionalGeneration'], 'text_config': TEXT}
GEMMA3 |= {'vision_config': VISION, 'mm_tokens_per_image': 4, 'image_token_index': 10, 'eos_token_id': [1, 2]}


def gemma3_tensors() -> Tensors:
    """Random tensors under the names of transformers' Gemma 3 for text."""
    kernels = {'q_proj': (8, 8), 'k_proj': (4, 8), 'v_proj': (4, 8), 'o_proj': (8, 8)}
    shapes: dict[str, tuple[int, ...]] = {f'self_attn.{name}.weight': shape for name, shape in kernels.items()}
    shapes |= {'self_attn.q_norm.weight': (4,), 'self_attn.k_norm.weight': (4,)}
    shapes |= {'mlp.gate_proj.weight': (12, 8), 'mlp.up_proj.weight': (12, 8), 'mlp.down_proj.weight': (8, 12)}
    norms = ('input', 'post_attention', 'pre_feedforward', 'post_feedforward')
    shapes |= {f'{name}_layernorm.weight': (8,) for name in norms}
    layer = {f'model.layers.0.{name}': shape for name, shape in shapes.items()}
    return random_tensors(layer | {'model.embed_tokens.weight': (11, 8), 'model.norm.weight': (8,)}, np.float32)


@pytest.mark.parametrize(
    ('old', 'new', 'above'), [('', 'language_model.', ''), ('model.', 'model.language_model.', 'model.')]
)
def test_a_model_of_text_and_images_is_read_as_its_text_model(
    write_hf_dir: Write, old: str, new: str, above: str
) -> None:
    """Tensors as published, and as transformers 5 names them in memory; what is left out is counted."""
    tensors = gemma3_tensors()
    stored = {new + name.removeprefix(old): array for name, array in tensors.items()}
    stored |= {
        above + 'vision_tower.embeddings.weight': np.zeros((3, 6), np.float32),
        above + 'vision_tower.norm.weight': np.zeros(6, np.float16),
        above + 'multi_modal_projector.weight': np.zeros((6, 8), np.float32),
    }
    directory = write_hf_dir(GEMMA3, stored)
    source = HuggingFaceSource(directory)
    wanted = {'vision_tower.': LeftOut(2, 3 * 6 * 4 + 6 * 2), 'multi_modal_projector.': LeftOut(1, 6 * 8 * 4)}
    assert source.left_out == {above + name: left for name, left in wanted.items()}
    assert source.cfg.family == 'gemma3_text'
    assert_holds(directory, tensors)


def test_what_is_left_out_is_said(write_hf_dir: Write, caplog: pytest.LogCaptureFixture) -> None:
    stored = {f'language_model.{name}': array for name, array in gemma3_tensors().items()}
    stored['vision_tower.norm.weight'] = np.zeros(6, np.float32)
    with caplog.at_level('WARNING', logger='absl'):
        HuggingFaceSource(write_hf_dir(GEMMA3, stored))
    assert 'read as its text model; left out: vision_tower.* 1 tensors, 24 bytes' in caplog.text


def test_an_export_of_a_text_part_is_the_text_model(write_hf_dir: Write, tmp_path: Path) -> None:
    directory = write_hf_dir(GEMMA3, {f'language_model.{name}': array for name, array in gemma3_tensors().items()})
    cfg, params = load_hf(directory)
    export_hf(tmp_path / 'text', cfg, params, source_dir=directory)
    written = json.loads((tmp_path / 'text' / 'config.json').read_text())
    assert (written['model_type'], written['architectures']) == ('gemma3_text', ['Gemma3ForCausalLM'])
    assert written['eos_token_id'] == [1, 2]
    assert not {'text_config', 'vision_config', 'mm_tokens_per_image'} & written.keys()
    again, same = load_hf(tmp_path / 'text')
    assert again == cfg
    jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'audio_config': {}}, 'has fields that jpt does not know.*audio_config'),
        ({'text_config': None}, "text_config=None: expected an object with model_type='gemma3_text'"),
        ({'text_config': TEXT | {'model_type': 'llama'}}, "expected an object with model_type='gemma3_text'"),
        ({'text_config': TEXT | {'use_mrope': True}}, 'use_mrope'),
        ({'tie_word_embeddings': True, 'text_config': TEXT | {'tie_word_embeddings': False}}, 'text_config says False'),
        ({'quantization_config': {'quant_method': 'fp8'}}, "quant_method='fp8', but there is no weight_scale_inv"),
        ({'quantization_config': {'quant_method': 'awq'}}, "quantization_config={'quant_method': 'awq'}"),
    ],
)
def test_a_config_of_several_parts_is_read_as_strictly(write_hf_dir: Write, change: dict, message: str) -> None:
    stored = {f'language_model.{name}': array for name, array in gemma3_tensors().items()}
    with pytest.raises(ValueError, match=message):
        HuggingFaceSource(write_hf_dir(GEMMA3 | change, stored))


def test_parts_that_nobody_knows_are_errors(write_hf_dir: Write) -> None:
    """Another part of such a model, and a known part in a model of text alone."""
    extra = {'audio_tower.weight': np.zeros(2, np.float32)}
    stored = {f'language_model.{name}': array for name, array in gemma3_tensors().items()}
    with pytest.raises(ValueError, match=r'audio_tower\.weight: unexpected'):
        load_hf(write_hf_dir(GEMMA3, stored | extra, 'many'))
    extra = {'vision_tower.weight': np.zeros(2, np.float32)}
    with pytest.raises(ValueError, match=r'vision_tower\.weight: unexpected'):
        load_hf(write_hf_dir(LLAMA, llama_tensors() | extra, 'one'))
