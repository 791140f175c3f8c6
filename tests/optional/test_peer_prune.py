"""Pruned models as transformers opens them: it computes the logits that jpt computes."""

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='torch is not installed: pip install torch transformers')
transformers = pytest.importorskip('transformers', reason='transformers is not installed')

from peer_models import random_config, random_model, random_tokens  # noqa: E402

from jpt.checkpoint.hf_export import write_hf  # noqa: E402
from jpt.checkpoint.opening import open_model  # noqa: E402
from jpt.checkpoint.source import load_tree  # noqa: E402
from jpt.models.transformer import forward, unembed  # noqa: E402
from jpt.pruning.importance import Importance  # noqa: E402
from jpt.pruning.target import DIVIDED, Target, steps  # noqa: E402

pytestmark = pytest.mark.filterwarnings('default')  # the peers' own warnings are not ours
FAMILIES = ('llama', 'mistral', 'qwen2', 'qwen3', 'olmo2', 'gemma', 'gemma2', 'gemma3_text')


@pytest.mark.parametrize('family', FAMILIES)
def test_pruned_models_open_in_transformers(family, tmp_path):
    config = random_config(family, 0)
    tokens = random_tokens(config, 0)
    random_model(config, 0, tokens).save_pretrained(tmp_path / 'whole')
    source = open_model(tmp_path / 'whole').source
    cfg, rng = source.cfg, np.random.default_rng(0)
    parts = (next(cfg.layer_kinds()).mlp_width, cfg.num_heads, cfg.width)
    scores = Importance(rng.random(cfg.num_layers), *(rng.random((cfg.num_layers, size)) for size in parts))
    heads = cfg.num_kv_heads
    width = None if cfg.embed_scale is not None else 2 * heads if family in DIVIDED else cfg.width - 3
    if width is None and family in DIVIDED and cfg.width % heads:
        pytest.skip('its heads would not divide its width')
    target = Target(intermediate_size=11, num_attention_heads=heads, hidden_size=width)
    made = list(steps(source, scores, target))[-1].source
    write_hf(made, tmp_path / 'small')
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'small', attn_implementation='eager')
    with torch.no_grad():
        wanted = peer(torch.from_numpy(tokens), use_cache=False).logits.numpy()
    params = load_tree(open_model(tmp_path / 'small').source)
    found = unembed(made.cfg, params, forward(made.cfg, params, tokens.astype(np.int32)).hidden_BTD)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
