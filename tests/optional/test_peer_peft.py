"""LoRA adapters beside PEFT itself, where it is installed: its adapters read here, ours loaded there."""

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='torch is not installed: pip install torch transformers peft')
pytest.importorskip('transformers', reason='transformers is not installed')
peft = pytest.importorskip('peft', reason='peft is not installed')

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from peer_models import random_config, random_model, random_tokens  # noqa: E402

from jpt.checkpoint.hf_import import load_hf  # noqa: E402
from jpt.checkpoint.peft import read_adapter, write_adapter  # noqa: E402
from jpt.models.transformer import forward, unembed  # noqa: E402
from jpt.quant.lora import add_lora  # noqa: E402

pytestmark = pytest.mark.filterwarnings('default')  # the peers' own warnings are not ours
TARGETS = {'qwen3': ['q_proj', 'o_proj', 'down_proj'], 'gemma2': ['v_proj', 'up_proj'], 'gpt2': ['c_attn', 'c_fc']}


def ours(cfg, params, tokens):
    with jax.default_matmul_precision('highest'):
        run = jax.jit(lambda params, tokens: unembed(cfg, params, forward(cfg, params, tokens).hidden_BTD))
        return run(params, tokens.astype(np.int32))


def theirs(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


@pytest.mark.parametrize(('family', 'seed'), [('qwen3', 5), ('gemma2', 6), ('gpt2', 7)])
def test_an_adapter_of_peft_gives_the_same_logits_here(family, seed, tmp_path):
    config = random_config(family, seed)
    model, tokens = random_model(config, seed), random_tokens(config, seed)
    model.save_pretrained(tmp_path / 'base')
    plain = theirs(model, tokens)
    first = TARGETS[family][0]
    lora = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=TARGETS[family],
        rank_pattern={first: 2},
        alpha_pattern={first: 5},
        use_rslora=family == 'qwen3',
        fan_in_fan_out=family == 'gpt2',
        init_lora_weights=False,  # both factors random, so that the adapter does something
        task_type='CAUSAL_LM',
    )
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(model, lora).eval()
    adapted.save_pretrained(tmp_path / 'adapter')
    cfg, params = load_hf(tmp_path / 'base')
    found = ours(cfg, read_adapter(tmp_path / 'adapter', cfg, params), tokens)
    wanted = theirs(adapted, tokens)
    assert np.abs(wanted - plain).max() > 0.01
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(('family', 'seed'), [('llama', 8), ('gemma3_text', 9), ('gpt2', 10)])
def test_peft_loads_an_adapter_of_ours_and_computes_the_same(family, seed, tmp_path):
    config = random_config(family, seed)
    model, tokens = random_model(config, seed), random_tokens(config, seed)
    model.save_pretrained(tmp_path / 'base')
    cfg, params = load_hf(tmp_path / 'base')
    adapted = add_lora(
        params,
        jax.random.key(seed),
        ['**/attn/{q,v}/kernel', '**/mlp/up/kernel'],
        rank=2,
        alpha=3,
        ranks={'**/up/**': 4},
    )
    random = np.random.default_rng(seed)

    def fill(path, leaf):
        is_b = getattr(path[-1], 'name', None) == 'b' or getattr(path[-1], 'key', None) == 'b'
        return jnp.asarray(random.normal(0, 0.3, leaf.shape), leaf.dtype) if is_b else leaf

    adapted = jax.tree_util.tree_map_with_path(fill, adapted)
    write_adapter(tmp_path / 'adapter', cfg, adapted, base_model=str(tmp_path / 'base'))
    plain = theirs(model, tokens)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / 'adapter').eval()
    wanted = theirs(loaded, tokens)
    assert np.abs(wanted - plain).max() > 0.01
    np.testing.assert_allclose(ours(cfg, adapted, tokens), wanted, rtol=0, atol=1e-4)
