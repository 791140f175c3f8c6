"""Generation with a tiny random model, against the full forward pass without a cache."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpt.generation.decode import bucket
from jpt.generation.engine import generate
from jpt.generation.prompts import check_lengths
from jpt.generation.sampling import SamplingConfig, draw, stack
from jpt.models.config import Compute, LayerKind, ModelConfig, Rope, Segment
from jpt.models.transformer import forward, init, unembed
from jpt.sharding.mesh import MeshConfig, make_mesh
from jpt.sharding.rules import Rules, param_specs, shardings, units_of

LOCAL, GLOBAL = LayerKind(Rope(), 6, 24), LayerKind(Rope(500.0), None, 24)
CFG = ModelConfig('gemma3_text', 48, 16, 4, 2, 8, (Segment((LOCAL, GLOBAL), 2), Segment((LOCAL,), 1)), 40, tied=True)
PROMPTS = [[5, 9, 11], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [40, 3, 40, 3, 40]]
NEW = 16
LENGTH = 32


@dataclasses.dataclass(frozen=True)
class TinyModel:
    config: ModelConfig = CFG
    params: object = None
    tokenizer: object = None
    assets: Path | None = None
    mesh: jax.sharding.Mesh | None = None
    compute: Compute = Compute()  # noqa: RUF009 (frozen)


@pytest.fixture(scope='module')
def model():
    params = init(CFG, jax.random.key(0))
    # Larger weights than at the start of training, so that tokens differ from one another.
    return TinyModel(params=jax.tree.map(lambda leaf: 3 * leaf if leaf.ndim > 2 else leaf, params))


@pytest.fixture(scope='module')
def logits_after(model):
    """Logits [V] after a list of tokens, by the forward pass over all of them."""
    full = jax.jit(lambda tokens: unembed(CFG, model.params, forward(CFG, model.params, tokens).hidden_BTD))

    def after(ids):
        return np.asarray(full(np.array([ids + [0] * (LENGTH - len(ids))], np.int32))[0, len(ids) - 1])

    return after


@pytest.fixture(scope='module')
def greedy(model):
    return generate(model, PROMPTS, max_new_tokens=NEW, logprobs=True)


def log_softmax(logits):
    wide = np.float64(logits)
    return wide - wide.max() - np.log(np.sum(np.exp(wide - wide.max())))


def test_greedy_tokens_and_their_logprobs_are_those_of_the_full_forward_pass(greedy, logits_after):
    for prompt, result in zip(PROMPTS, greedy, strict=True):
        assert (len(result.token_ids), result.finish_reason, result.prompt_ids) == (NEW, 'length', prompt)
        for i, (token, logp) in enumerate(zip(result.token_ids, result.logprobs, strict=True)):
            logits = logits_after(prompt + result.token_ids[:i])
            assert token == logits.argmax()
            assert logp == pytest.approx(log_softmax(logits)[token], abs=1e-4)
        assert result.sampled_logprobs == [0.0] * NEW
    assert len({tuple(result.token_ids) for result in greedy}) == 4, 'rows that differ, or the test shows nothing'


def test_rows_end_at_their_own_end_token_and_budget(model, greedy):
    """The batch goes on for the others; the program is the one of the test before."""
    ends = [greedy[0].token_ids[4], greedy[2].token_ids[0]]
    budgets = [NEW, 2, NEW, 9]
    for full, budget, result in zip(
        greedy, budgets, generate(model, PROMPTS, max_new_tokens=budgets, eos_ids=ends, logprobs=True), strict=True
    ):
        cut = next((i + 1 for i, token in enumerate(full.token_ids) if token in ends), NEW)
        wanted = full.token_ids[: min(cut, budget)]
        assert result.token_ids == wanted
        assert result.finish_reason == ('eos' if wanted[-1] in ends else 'length')
        np.testing.assert_allclose(result.logprobs, full.logprobs[: len(wanted)], atol=1e-4)


@pytest.fixture(scope='module')
def sampled(model):
    """Two greedy rows, one of them penalized, and two that draw."""
    return generate(model, PROMPTS, max_new_tokens=NEW, logprobs=True, **SETTINGS)


SETTINGS = {
    'temperature': [0.0, 1.5, 0.7, 0.0],
    'top_k': [0, 0, 12, 0],
    'top_p': [1.0, 0.9, 1.0, 1.0],
    'repetition_penalty': [1.0, 1.0, 1.2, 1.8],
    'seed': [1, 2, 2**32 - 1, 4],
}


def test_every_row_of_a_mixed_batch_draws_as_its_own_settings_say(model, sampled, greedy, logits_after):
    """The draw itself is tested in test_sampling.py; here it gets logits, seen tokens and steps from this test."""
    drawn = jax.jit(draw)
    for row, result in enumerate(sampled):
        config = SamplingConfig(**{name: values[row] for name, values in SETTINGS.items()})
        for i, token in enumerate(result.token_ids):
            ids = PROMPTS[row] + result.token_ids[:i]
            seen = np.isin(np.arange(CFG.vocab_size), ids)[None]
            wanted, logps = drawn(logits_after(ids)[None], seen, stack([config]), np.int32([i]))
            assert token == wanted[0], (row, i)
            assert result.logprobs[i] == pytest.approx(float(logps.model[0]), abs=1e-4)
            assert result.sampled_logprobs[i] == pytest.approx(float(logps.sampled[0]), abs=1e-3)
    assert sampled[0].token_ids == greedy[0].token_ids
    assert sampled[3].token_ids != greedy[3].token_ids


def test_a_row_alone_gives_what_it_gives_in_a_batch(model, sampled):
    settings = {name: values[1] for name, values in SETTINGS.items()}
    (alone,) = generate(model, PROMPTS[1:2], max_new_tokens=NEW, logprobs=True, **settings)
    assert alone.token_ids == sampled[1].token_ids
    np.testing.assert_allclose(alone.sampled_logprobs, sampled[1].sampled_logprobs, atol=1e-4)


@pytest.mark.parametrize('sizes', [{'data': 2, 'tensor': 4}, {'pipe': 2, 'fsdp': 2, 'tensor': 2}], ids=str)
def test_a_mesh_changes_nothing(model, greedy, sizes):
    """Rows over data, heads over tensor (two kv heads on four devices are held whole), a pipeline folded into data."""
    mesh = make_mesh(MeshConfig(**{'data': 1, **sizes}))
    specs = param_specs(model.params, Rules(mesh.shape, units_of(CFG)))
    placed = dataclasses.replace(model, mesh=mesh, params=jax.device_put(model.params, shardings(mesh, specs)))
    results = generate(placed, PROMPTS[:3], max_new_tokens=NEW)
    assert [result.token_ids for result in results] == [result.token_ids for result in greedy[:3]]
    assert results[0].logprobs is None
    assert results[0].sampled_logprobs is None


def test_batches_are_cut_and_the_order_is_kept(model, greedy):
    """Prompts of several lengths, shortest first in the list and longest first in the batches; the last runs alone."""
    order = (1, 0, 3, 2, 1)
    results = generate(model, [PROMPTS[i] for i in order], max_new_tokens=3, batch_size=4, logprobs=True)
    assert [result.token_ids for result in results] == [greedy[i].token_ids[:3] for i in order]
    assert generate(model, []) == []


def test_logits_that_are_not_numbers_are_an_error(model):
    broken = model.params | {'final_norm': {'scale': jnp.full(CFG.width, jnp.nan, jnp.float32)}}
    with pytest.raises(FloatingPointError, match=r'prompts\[2\]: the logits of the model are not numbers'):
        generate(dataclasses.replace(model, params=broken), PROMPTS, max_new_tokens=NEW, logprobs=True)


@pytest.mark.parametrize(
    ('prompts', 'options', 'message'),
    [
        ([[1], []], {}, r'prompts\[1\] has no tokens'),
        ([[1, 48]], {}, r'prompts\[0\] holds id 48: expected ids from 0 to 47'),
        ('text', {}, 'prompts is one text: expected a list'),
        (['text'], {}, 'the model has no tokenizer'),
        ([[1]], {'stop': ['x']}, 'stop and stream need text'),
        ([[1]] * 2, {'top_k': [1, 2, 3], 'max_new_tokens': 9}, 'top_k has 3 values for 2 prompts'),
        ([[1]], {'max_new_tokens': 0}, r'max_new_tokens=0 for prompts\[0\]: expected a positive integer'),
        ([[1] * 30], {'max_new_tokens': 11}, r'has 30 tokens, and max_new_tokens is 11: together at most 40'),
        ([[1]], {'seed': -1, 'max_new_tokens': 9}, 'seed=-1: expected'),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_runs(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(TinyModel(), prompts, **options)


@pytest.mark.parametrize(
    ('rope', 'longest'),
    [
        (Rope(), 40),
        (Rope(kind='yarn', factor=4.0, original_length=30), 120),
        (Rope(kind='yarn', original_length=8), 40),
    ],
)
def test_positions_that_yarn_adds_may_be_used_though_max_length_is_without_them(rope, longest):
    """Qwen2.5's instruction for long texts adds the scaling and leaves max_position_embeddings alone."""
    cfg = dataclasses.replace(TinyModel().config, segments=(Segment((LayerKind(rope, None, 8),), 2),))
    check_lengths(cfg, [[1] * 10], [longest - 10])
    with pytest.raises(ValueError, match=f'together at most {longest} '):
        check_lengths(cfg, [[1] * 10], [longest - 9])


def test_an_unknown_setting_is_a_type_error_that_lists_the_known_ones():
    with pytest.raises(TypeError, match="unknown setting 'temprature': expected one of temperature, top_k"):
        generate(TinyModel(), [[1]], max_new_tokens=9, temprature=1.0)


def test_buckets_are_few_and_never_much_larger():
    sizes = sorted({bucket(n) for n in range(1, 4097)})
    assert sizes == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
    assert all(n <= bucket(n) < 1.5 * n for n in range(16, 4097))
    assert [bucket(n, least=1) for n in range(1, 9)] == [1, 2, 3, 4, 6, 6, 8, 8]
