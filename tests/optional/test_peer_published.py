"""Beside transformers itself: checkpoints as they are published, with older names, or with more than a text model."""

import json
import re

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='torch is not installed: pip install torch transformers')
transformers = pytest.importorskip('transformers', reason='transformers is not installed')

from safetensors.numpy import load_file, save_file  # noqa: E402

from jpt.checkpoint.hf_export import export_hf  # noqa: E402
from jpt.checkpoint.hf_import import HuggingFaceSource, load_hf  # noqa: E402
from jpt.models.transformer import forward, unembed  # noqa: E402

pytestmark = pytest.mark.filterwarnings('default')  # the peers' own warnings are not ours
TOLERANCE = 1e-4
BERT = {
    'vocab_size': 41,
    'hidden_size': 24,
    'num_hidden_layers': 2,
    'num_attention_heads': 3,
    'intermediate_size': 40,
    'max_position_embeddings': 32,
}
TEXT = {
    'vocab_size': 50,
    'hidden_size': 32,
    'intermediate_size': 40,
    'num_hidden_layers': 4,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 8,
    'max_position_embeddings': 64,
    'pad_token_id': 0,
    'bos_token_id': None,
    'eos_token_id': None,
}


def drawn(model):
    """The model with weights of which every one matters, in evaluation mode."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            centre = 1.0 if weight.dim() == 1 and name.endswith('norm.weight') else 0.0
            weight.copy_(centre + 0.15 * torch.randn(weight.shape, generator=random))
    return model.float().eval()


def logits_of(directory, tokens):
    cfg, params = load_hf(directory)
    return cfg, params, np.asarray(unembed(cfg, params, forward(cfg, params, tokens.astype(np.int32)).hidden_BTD))


def theirs(model, tokens):
    with torch.no_grad():
        result = model(torch.from_numpy(tokens))
    return (result.logits if 'logits' in result else result.prediction_logits).numpy()


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('kind', ['BertForMaskedLM', 'BertForPreTraining'])
def test_bert_under_older_names_computes_the_same_and_its_export_loads(tmp_path, kind, tied):
    model = drawn(getattr(transformers, kind)(transformers.BertConfig(**BERT, tie_word_embeddings=tied)))
    model.save_pretrained(tmp_path / 'theirs')
    file = tmp_path / 'theirs' / 'model.safetensors'
    older = {re.sub('LayerNorm.weight$', 'LayerNorm.gamma', name): array for name, array in load_file(file).items()}
    older = {re.sub('LayerNorm.bias$', 'LayerNorm.beta', name): array for name, array in older.items()}
    save_file(older, file, {'format': 'pt'})
    config = json.loads((tmp_path / 'theirs' / 'config.json').read_text())
    (tmp_path / 'theirs' / 'config.json').write_text(json.dumps(config | {'architectures': ['BertForMaskedLM']}))

    tokens = np.random.default_rng(0).integers(0, 41, (2, 9))
    cfg, params, logits = logits_of(tmp_path / 'theirs', tokens)
    wanted = theirs(model, tokens)
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=TOLERANCE)
    export_hf(tmp_path / 'ours', cfg, params, source_dir=tmp_path / 'theirs')
    loaded, report = getattr(transformers, kind).from_pretrained(tmp_path / 'ours', output_loading_info=True)
    # Beside a decoder of its own it keeps a bias that it never reads.
    assert report.pop('missing_keys') == (set() if tied else {'cls.predictions.bias'})
    assert not any(report.values()), report
    np.testing.assert_allclose(theirs(loaded.eval(), tokens), wanted, rtol=0, atol=0)


def _gemma3():
    text = TEXT | {'sliding_window': 5, 'tie_word_embeddings': True}
    vision = {'hidden_size': 16, 'intermediate_size': 20, 'num_hidden_layers': 1, 'num_attention_heads': 2}
    vision |= {'image_size': 28, 'patch_size': 14, 'vision_use_head': False}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


def _llama4():
    text = TEXT | {'intermediate_size_mlp': 44, 'num_local_experts': 4, 'interleave_moe_layer_step': 2}
    text |= {'attention_chunk_size': 5, 'floor_scale': 3}
    vision = {'hidden_size': 16, 'intermediate_size': 64, 'num_hidden_layers': 1, 'num_attention_heads': 2}
    vision |= {'image_size': 28, 'patch_size': 14, 'projector_input_dim': 16, 'projector_output_dim': 16}
    vision |= {'vision_output_dim': 16}
    config = transformers.Llama4Config(text_config=text, vision_config=vision)
    config.text_config._experts_implementation = 'eager'
    return transformers.Llama4ForConditionalGeneration(config)


@pytest.mark.parametrize(('make', 'text'), [(_gemma3, 'gemma3_text'), (_llama4, 'llama4_text')])
def test_the_text_of_a_multimodal_model_computes_the_same_and_its_export_loads(tmp_path, make, text):
    model = drawn(make())
    model.save_pretrained(tmp_path / 'theirs')
    tokens = np.random.default_rng(0).integers(1, 41, (2, 11))
    cfg, params, logits = logits_of(tmp_path / 'theirs', tokens)
    assert cfg.family == text
    left = HuggingFaceSource(tmp_path / 'theirs').left_out
    others = [w for name, w in model.named_parameters() if 'vision' in name or 'projector' in name]
    assert sum(each.tensors for each in left.values()) == len(others)
    assert sum(each.bytes for each in left.values()) == sum(4 * w.numel() for w in others)
    wanted = theirs(model, tokens)
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=TOLERANCE)
    export_hf(tmp_path / 'ours', cfg, params, source_dir=tmp_path / 'theirs')
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours', output_loading_info=True)
    assert not any(report.values()), report
    np.testing.assert_allclose(theirs(loaded.eval(), tokens), wanted, rtol=0, atol=1e-5)
