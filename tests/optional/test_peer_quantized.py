"""Quantized weights that jpt writes, loaded by transformers: no key missing or unexpected, and the numbers meant.

Blocks of FP8 need accelerate beside transformers (5.14 to 5.23 were tried), compressed-tensors its own package.
"""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='torch is not installed: pip install torch transformers accelerate')
transformers = pytest.importorskip('transformers', reason='transformers is not installed')

import jax  # noqa: E402

import jpt  # noqa: E402
from jpt.models.config import Compute  # noqa: E402
from jpt.models.families import config_from_hf  # noqa: E402
from jpt.models.transformer import forward, init, unembed  # noqa: E402
from jpt.quant.formats import FORMATS  # noqa: E402
from jpt.quant.recipes import chosen, quantized_tree, recipe_of  # noqa: E402
from jpt.quant.tensors import quantize  # noqa: E402

pytestmark = pytest.mark.filterwarnings('default')  # the peers' own warnings are not ours
FIELDS = {
    'model_type': 'llama', 'hidden_size': 128, 'intermediate_size': 256, 'num_hidden_layers': 2, 'vocab_size': 37,
    'num_attention_heads': 4, 'num_key_value_heads': 4, 'head_dim': 32, 'max_position_embeddings': 64,
    'rms_norm_eps': 1e-6, 'rope_theta': 1e4, 'tie_word_embeddings': False,
}  # fmt: skip
EXPERTS = FIELDS | {
    'model_type': 'qwen3_moe', 'num_experts': 2, 'num_experts_per_tok': 1, 'moe_intermediate_size': 128,
    'decoder_sparse_step': 1, 'mlp_only_layers': [], 'norm_topk_prob': True,
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 37, (2, 9))


def quantized(fields, name):
    """A model whose scales bfloat16 holds, as compressed-tensors keeps them in the dtype of the weight."""
    cfg = config_from_hf(fields)
    params = jax.tree.map(lambda leaf: leaf.astype('bfloat16'), init(cfg, jax.random.key(1)))

    def kernel(path, weight, form):
        scale = np.full(weight.shape[:-2], 0.0625, np.float32) if form.inputs == 'tensor' else None
        made = quantize(weight, form, input_scale=scale)
        if form.scale != 'float32':
            return made
        return dataclasses.replace(made, scale=made.scale.astype('bfloat16').astype('float32'))

    formats = chosen(params, recipe_of(name))
    return jpt.Model(cfg, quantized_tree(params, formats, kernel))


def opened(directory, dtype=torch.float32):
    """transformers' model, after it said that every key was there and no other."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys', 'error_msgs'):
        assert not info.get(kind), (kind, info[kind])
    return model.eval()


@pytest.mark.parametrize(
    ('fields', 'name'), [(FIELDS, 'fp8_block'), (FIELDS, 'fp8_block_ue8m0'), (EXPERTS, 'fp8_block')]
)
def test_transformers_loads_blocks_of_fp8(fields, name, tmp_path):
    """Without a GPU it dequantizes them on loading."""
    pytest.importorskip('accelerate', reason='accelerate is not installed')
    model = quantized(fields, name)
    model.export(tmp_path / 'out')
    with torch.no_grad():
        found = opened(tmp_path / 'out').float()(torch.from_numpy(TOKENS)).logits.numpy()
    wanted = jpt.load(tmp_path / 'out', dtype='float32').logits(TOKENS)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


# The relative difference of logits. int8 inputs: the library divides by 127.5 where jpt divides by 127.
DIFFERENCES = {
    'fp8_tensor': 1e-5, 'fp8_channel_token': 1e-5, 'fp8_block': 1e-5, 'fp8_weights': 1e-5, 'int8_weights': 1e-5,
    'fp8_block_weights': 1e-5, 'int8_tensor': 0.05,
    'int4_weights': 1e-5, 'int8': 0.05,
}  # fmt: skip


@pytest.mark.parametrize('name', DIFFERENCES)
def test_transformers_loads_compressed_tensors(name, tmp_path):
    """It decompresses weights before the first product, and rounds inputs as the config says."""
    pytest.importorskip('compressed_tensors', reason='compressed-tensors is not installed')
    model = quantized(FIELDS, name)
    model.export(tmp_path / 'out', layout='compressed-tensors')
    with torch.no_grad():
        found = opened(tmp_path / 'out')(torch.from_numpy(TOKENS)).logits.numpy()
    if FORMATS[name].inputs == 'as_they_are':
        model = jpt.load(tmp_path / 'out', dtype='float32')  # codes would stand for numbers in the dtype of the weight
    hidden = forward(model.config, model.params, TOKENS, compute=Compute(dtype='float32')).hidden_BTD
    wanted = np.asarray(unembed(model.config, model.params, hidden))
    difference = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert difference < DIFFERENCES[name], difference


@pytest.mark.parametrize('name', ['mxfp8', 'nvfp4_weights'])
def test_transformers_decompresses_what_is_meant(name, tmp_path):
    """Formats that the library decompresses to bfloat16 whatever the model's dtype is, so that none but that runs."""
    pytest.importorskip('compressed_tensors', reason='compressed-tensors is not installed')
    quantized(FIELDS, name).export(tmp_path / 'out', layout='compressed-tensors')
    theirs = opened(tmp_path / 'out', torch.bfloat16)
    with torch.no_grad():
        theirs(torch.from_numpy(TOKENS))
    found, plain = theirs.state_dict(), jpt.load(tmp_path / 'out', dtype='float32').params['layers'][0][0]
    for stem, weight in (('self_attn.q_proj', plain['attn']['q']), ('mlp.down_proj', plain['mlp']['down'])):
        for layer in (0, 1):
            mine, other = weight['kernel'][layer], found[f'model.layers.{layer}.{stem}.weight'].float().numpy()
            np.testing.assert_allclose(other, mine, rtol=0 if name == 'mxfp8' else 2**-7, atol=0)
