"""BERT against transformers: masked-word logits, hidden states, pooled outputs, gradients (tests/golden/encoders)."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jpt
from jpt.models.encoder import next_sentence, pooled
from jpt.models.families import config_from_hf, config_to_hf
from jpt.models.names import from_hf, to_hf
from jpt.models.transformer import forward, unembed

ENCODERS = pathlib.Path(__file__).parents[1] / 'golden' / 'encoders'
NAMES = sorted(path.name for path in ENCODERS.iterdir())
TOLERANCE = 1e-4


def read_config(name, file='config.json'):
    return json.loads((ENCODERS / name / file).read_text())


def load(name):
    cfg = config_from_hf(read_config(name))
    return cfg, from_hf(cfg, load_file(ENCODERS / name / 'model.safetensors'))


def cross_entropy(logits, labels):
    """The mean over labels that are asked for (not -100)."""
    asked = labels != -100
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.where(asked, labels, 0)[..., None], -1)[..., 0]
    return -jnp.sum(jnp.where(asked, chosen, 0)) / asked.sum()


@pytest.mark.parametrize('name', NAMES)
def test_outputs_and_gradients_equal_those_of_transformers(name):
    golden = np.load(ENCODERS / name / 'golden.npz')
    cfg, params = load(name)
    mask = golden['mask'].astype(np.int32)

    def loss_and_outputs(params):
        result = forward(cfg, params, golden['tokens'], None, mask, token_types_BT=golden['token_types'])
        logits = unembed(cfg, params, result.hidden_BTD)
        loss = cross_entropy(logits, golden['labels'])
        outputs = {'logits': logits, 'hidden': result.hidden_BTD}
        if cfg.encoder.pooled:
            outputs['pooled'] = pooled(cfg, params, result.hidden_BTD)
            outputs['next_sentence_logits'] = next_sentence(cfg, params, result.hidden_BTD)
            loss += cross_entropy(outputs['next_sentence_logits'], golden['next_sentence'].reshape(-1))
        return loss, outputs

    with jax.default_matmul_precision('highest'):
        (loss, outputs), grads = jax.jit(jax.value_and_grad(loss_and_outputs, has_aux=True))(params)
    np.testing.assert_allclose(loss, golden['loss'], rtol=0, atol=TOLERANCE)
    for output, values in outputs.items():
        real = mask > 0 if values.ndim == 3 else slice(None)
        np.testing.assert_allclose(values[real], golden[output][real], rtol=0, atol=TOLERANCE)

    ours = to_hf(cfg, grads)
    wanted = {key.removeprefix('grad/'): golden[key] for key in golden.files if key.startswith('grad/')}
    assert ours.keys() == wanted.keys()
    global_norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in wanted.values()))
    for tensor, gradient in wanted.items():
        error = np.linalg.norm(ours[tensor] - gradient)
        if tensor.endswith('self.key.bias'):  # 0 in exact arithmetic: it moves all scores of a query alike
            assert error <= 1e-7 * global_norm, tensor
        else:
            assert error <= TOLERANCE * max(np.linalg.norm(gradient), 1e-6 * global_norm), tensor


@pytest.mark.parametrize('name', NAMES)
def test_config_and_tensors_go_back_as_they_came(name):
    cfg, params = load(name)
    source = load_file(ENCODERS / name / 'model.safetensors')
    written = to_hf(cfg, params)
    assert written.keys() == source.keys()
    for tensor, values in source.items():
        np.testing.assert_array_equal(written[tensor], values)
    config = config_to_hf(cfg)
    assert config_from_hf(json.loads(json.dumps(config))) == cfg
    assert config_from_hf(read_config(name, 'config_legacy.json')) == cfg
    assert config['architectures'] == read_config(name)['architectures']


def test_an_encoder_is_loaded_exported_and_asked_for_logits_but_not_for_text(tmp_path):
    model = jpt.load(ENCODERS / 'bert')
    golden = np.load(ENCODERS / 'bert' / 'golden.npz')
    assert model.logits(golden['tokens'][:1]).shape == (1, golden['tokens'].shape[1], model.config.vocab_size)
    model.export(tmp_path / 'out')
    again = jpt.load(tmp_path / 'out')
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    with pytest.raises(ValueError, match='bert is an encoder'):
        model.generate([[1, 2, 3]])
    with pytest.raises(ValueError, match='no pooler'):
        pooled(model.config, model.params, jnp.zeros((1, 2, 36)))


def test_a_later_token_changes_an_earlier_one():
    cfg, params = load('bert')
    rows = jnp.asarray([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 9]])
    outputs = forward(cfg, params, rows).hidden_BTD[:, 0]
    assert float(jnp.abs(outputs[0] - outputs[1]).max()) > 1e-3
