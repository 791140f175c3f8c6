"""Beside transformers itself, where it is installed: other sizes, options and seeds than the golden files hold."""

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='torch is not installed: pip install torch transformers')
transformers = pytest.importorskip('transformers', reason='transformers is not installed')

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from peer_models import FAMILIES, random_config, random_model, random_tokens, stored  # noqa: E402
from transformers.core_model_loading import revert_weight_conversion  # noqa: E402

from jpt.checkpoint.hf_export import export_hf  # noqa: E402
from jpt.checkpoint.hf_import import load_hf  # noqa: E402
from jpt.models.names import to_hf  # noqa: E402
from jpt.models.transformer import forward, init, unembed  # noqa: E402

pytestmark = pytest.mark.filterwarnings('default')  # the peers' own warnings are not ours
CASES = [*((family, 0) for family in FAMILIES), ('llama', 1), ('llama', 2), ('qwen3', 1), ('gemma3_text', 1)]
CASES += [('qwen3_moe', 1), ('deepseek_v3', 1), ('gpt_oss', 1), ('llama4_text', 1), ('nemotron_h', 1)]
EAGER = {'attn_implementation': 'eager', 'experts_implementation': 'eager'}
TOLERANCE = 1e-4


def ours(cfg, params, tokens):
    """Logits, and the gradients of the mean next-token cross-entropy by Hugging Face name."""

    def loss(params, tokens_BT):
        logits = unembed(cfg, params, forward(cfg, params, tokens_BT).hidden_BTD)
        logp = jax.nn.log_softmax(logits[:, :-1], axis=-1)
        return -jnp.take_along_axis(logp, tokens_BT[:, 1:, None], axis=-1).mean(), logits

    with jax.default_matmul_precision('highest'):
        (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, tokens.astype(np.int32))
    return np.asarray(logits), to_hf(cfg, grads)


def theirs(model, tokens):
    ids = torch.from_numpy(tokens)
    logits = model(ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    grads = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in stored(model).items()}
    return logits.detach().numpy(), {k: v.numpy() for k, v in revert_weight_conversion(model, grads).items()}


@pytest.mark.parametrize(('family', 'seed'), CASES)
def test_logits_and_gradients_of_random_models(family, seed, tmp_path):
    config = random_config(family, seed)
    tokens = random_tokens(config, seed)
    model = random_model(config, seed, tokens)
    model.save_pretrained(tmp_path)
    logits, grads = ours(*load_hf(tmp_path), tokens)
    wanted, wanted_grads = theirs(model, tokens)
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=TOLERANCE)
    assert grads.keys() == wanted_grads.keys()
    global_norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in wanted_grads.values()))
    errors = {
        name: np.linalg.norm(grads[name] - g) / max(np.linalg.norm(g), 1e-6 * global_norm)
        for name, g in wanted_grads.items()
    }
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


@pytest.mark.parametrize('family', FAMILIES)
def test_transformers_loads_an_export_with_no_key_missing_or_unexpected(family, tmp_path):
    config = random_config(family, 2)
    tokens = random_tokens(config, 2)
    model = random_model(config, 2, tokens)
    model.save_pretrained(tmp_path / 'theirs')
    cfg, params = load_hf(tmp_path / 'theirs')
    export_hf(tmp_path / 'ours', cfg, params, source_dir=tmp_path / 'theirs', max_shard_size='30KB')
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / 'ours', **EAGER, output_loading_info=True
    )
    assert type(loaded) is type(model)
    assert not any(report.values()), report
    assert loaded.dtype == torch.float32
    for ids in (tokens, tokens[:, :7]):
        with torch.no_grad():
            found, wanted = (peer(torch.from_numpy(ids)).logits for peer in (loaded, model))
        # The length of a chunk of a scan moves the rounding only, and is not part of what jpt writes.
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 if hasattr(config, 'chunk_size') else 0)


@pytest.mark.parametrize('family', ['llama', 'gemma3_text', 'gpt2', 'mixtral', 'deepseek_v3', 'nemotron_h'])
def test_transformers_computes_what_a_model_born_here_computes(family, tmp_path):
    """A model that never was a Hugging Face directory: initialised by jpt, exported, and run by the peer."""
    config = random_config(family, 3)
    tokens = random_tokens(config, 5)
    random_model(config, 3, tokens).save_pretrained(tmp_path / 'theirs')
    cfg, _ = load_hf(tmp_path / 'theirs')
    params = jax.jit(lambda key: init(cfg, key))(jax.random.key(4))
    export_hf(tmp_path / 'ours', cfg, params)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours', **EAGER).eval()
    with torch.no_grad():
        wanted = loaded(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(ours(cfg, params, tokens)[0], wanted, rtol=0, atol=TOLERANCE)
