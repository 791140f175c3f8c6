"""Greedy text, token for token that of transformers' `generate`; and the scores that sampling draws from.

The golden models stand for their families; the two pretrained models of ../shared/data for real text.
"""

import json
import pathlib

import jax
import numpy as np
import pytest

import jpt
from jpt.generation.sampling import SamplingConfig, penalize, process, stack

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
NAMES = sorted(path.name for path in (GOLDEN / 'models').iterdir())
# One for each way in which a decoding step can go wrong; the others repeat these and run in .ci/full.
CHOSEN = ('llama', 'llama_dynamic', 'llama_llama3', 'mistral_window', 'qwen3_mixed', 'gemma2', 'gemma3_text', 'gpt2')
CHOSEN += ('deepseek_v3', 'gpt_oss', 'llama4_text', 'mamba2', 'nemotron_h_moe')
NEW_TOKENS = 12


@pytest.mark.parametrize(
    'name', [name if name in CHOSEN else pytest.param(name, marks=pytest.mark.full) for name in NAMES]
)
def test_greedy_ids_equal_those_of_transformers(name):
    """Two prompts of 3 and 11 tokens in one batch give what transformers gives to each of them alone.

    In llama, llama_llama3, qwen3, gemma2 and gpt2 the first ends at a token of the list in generation_config.json.
    """
    golden = np.load(GOLDEN / 'models' / name / 'golden.npz')
    model = jpt.load(GOLDEN / 'models' / name)
    prompts = [golden['prompt_0'].tolist(), golden['prompt_1'].tolist()]
    with jax.default_matmul_precision('highest'):
        results = model.generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0.0)
    for i, result in enumerate(results):
        wanted = golden[f'greedy_{i}'].tolist()
        assert result.prompt_ids == prompts[i]
        assert result.token_ids == wanted
        assert result.finish_reason == ('eos' if len(wanted) < NEW_TOKENS else 'length')


def test_the_golden_continuations_end_both_ways():
    lengths = {name: len(np.load(GOLDEN / 'models' / name / 'golden.npz')['greedy_0']) for name in CHOSEN}
    assert min(lengths.values()) < NEW_TOKENS == max(lengths.values())


def test_scores_after_the_processors_equal_those_of_transformers():
    """Repetition penalty, temperature, top-k, top-p and min-p, alone and together: the same tokens stay possible."""
    golden = np.load(GOLDEN / 'sampling.npz')
    logits, context = golden['logits'], golden['context']
    settings = json.loads(str(golden['settings']))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, context, True, axis=1)

    @jax.jit
    def scores(sampling):
        return process(penalize(logits, seen, sampling.repetition_penalty), sampling)

    for setting, wanted in zip(settings, golden['scores'], strict=True):
        found = np.asarray(scores(stack([SamplingConfig(**{'temperature': 1.0, **setting})] * len(logits))))
        np.testing.assert_array_equal(np.isfinite(found), np.isfinite(wanted), err_msg=str(setting))
        kept = np.isfinite(wanted)
        np.testing.assert_allclose(found[kept], wanted[kept], rtol=1e-6, atol=0, err_msg=str(setting))


@pytest.mark.parametrize('name', ['stories260K', 'babyllama-105'])
def test_pretrained_models_reproduce_their_log_probabilities_and_text(name, shared_data):
    """golden.json there holds what a float32 numpy forward pass of the same files gave, rounded to 6 (5) decimals."""
    directory = shared_data / 'models' / name
    golden = json.loads((directory / 'golden.json').read_text())
    model = jpt.load(directory)
    ids = golden['prompt_ids']
    assert model.tokenizer is not None
    assert model.tokenizer.encode(golden['prompt_text'], bos=True) == ids
    with jax.default_matmul_precision('highest'):
        logits = np.asarray(model.logits([ids]))[0].astype(np.float64)
        length = len(golden['greedy_from_bos_ids'])
        text = model.generate([[1]], max_new_tokens=length - 1, temperature=0.0, eos_ids=())[0]
    logps = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    found = logps[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(found, golden['prompt_token_logprobs'], rtol=0, atol=1e-4)
    best = np.argsort(-logits[-1])[:5]
    assert best.tolist() == [token for token, _ in golden['last_top5']]
    np.testing.assert_allclose(logits[-1][best], [logit for _, logit in golden['last_top5']], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits[-1, :8], golden['last_logits_first8'], rtol=0, atol=1e-4)
    assert [1, *text.token_ids] == golden['greedy_from_bos_ids']
    assert model.tokenizer.decode(text.token_ids) == golden['greedy_from_bos_text']
