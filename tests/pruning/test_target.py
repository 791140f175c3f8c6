"""From scores to a smaller model: parts that never did anything go first, and without them the logits are the same."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from jpt.checkpoint.opening import open_model
from jpt.checkpoint.source import TreeSource, load_tree
from jpt.data.batch import empty_batch
from jpt.models.calibration import calibrate
from jpt.models.transformer import forward, unembed
from jpt.pruning.importance import importance
from jpt.pruning.target import Target, check_target, steps

MODELS = pathlib.Path(__file__).parents[1] / 'golden' / 'models'


def logits(cfg, params, tokens):
    return np.asarray(unembed(cfg, params, forward(cfg, params, tokens).hidden_BTD))


def scores_of(cfg, params, tokens):
    batch = empty_batch(*tokens.shape)
    batch.tokens[:], batch.segment_ids[:], batch.positions[:] = tokens, 1, np.arange(tokens.shape[1])
    return importance(cfg, calibrate(cfg, params, [batch]))


def silence(cfg, params, rng, channels, groups):
    """Some MLP channels and kv heads of every layer give 0 from now on: other ones in each layer."""
    for segment in params['layers']:
        for kind in segment:
            attn, mlp = kind['attn'], kind['mlp']
            for repeat in range(len(attn['v']['kernel'])):
                gone = rng.permutation(mlp['up']['kernel'].shape[1])[:channels]
                for leaf in mlp['up'].values():
                    leaf[repeat, gone] = 0
                for group in rng.permutation(cfg.num_kv_heads)[:groups]:
                    for leaf in attn['v'].values():
                        leaf[repeat, group * cfg.head_dim : (group + 1) * cfg.head_dim] = 0


@pytest.mark.parametrize('name', ['llama_bias', 'mistral_window', 'qwen2', 'qwen3', 'gemma2', 'gemma3_irregular'])
def test_what_does_nothing_goes_and_nothing_changes(name):
    source, rng = open_model(MODELS / name).source, np.random.default_rng(len(name))
    cfg, params = source.cfg, jax.tree.map(np.array, load_tree(source))
    groups = cfg.num_kv_heads // 2
    silence(cfg, params, rng, 5, groups)
    tokens = rng.integers(0, cfg.vocab_size, (2, 7)).astype(np.int32)
    width = next(cfg.layer_kinds()).mlp_width - 5
    target = Target(intermediate_size=width, num_key_value_heads=cfg.num_kv_heads - groups)
    made = list(steps(TreeSource(cfg, params), scores_of(cfg, params, tokens), target))
    assert [step.name for step in made] == ['MLP channels', 'heads']
    small = made[-1].source
    assert (small.cfg.num_kv_heads, next(small.cfg.layer_kinds()).mlp_width) == (cfg.num_kv_heads - groups, width)
    assert len(set(made[-1].kept.mlp)) > 1  # not the same in all layers
    others = rng.integers(0, cfg.vocab_size, (2, 7)).astype(np.int32)
    np.testing.assert_allclose(
        logits(small.cfg, load_tree(small), others), logits(cfg, params, others), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize('name', ['llama_bias', 'qwen3', 'mistral_window'])
def test_hidden_dimensions_that_are_always_zero_go_and_nothing_changes(name):
    """Norms are over fewer dimensions then, and their scales make up for it; eps, which they do not scale, is tiny."""
    source, rng = open_model(MODELS / name).source, np.random.default_rng(3)
    cfg, params = dataclasses.replace(source.cfg, norm_eps=1e-9), jax.tree.map(np.array, load_tree(source))
    gone = rng.permutation(cfg.width)[: 2 * cfg.num_heads]
    params['embed']['embedding'][:, gone] = 0
    for part, name in (('attn', 'out'), ('mlp', 'down')):
        for leaf in params['layers'][0][0][part][name].values():
            leaf[:, gone] = 0
    tokens = rng.integers(0, cfg.vocab_size, (2, 7)).astype(np.int32)
    target = Target(hidden_size=cfg.width - len(gone))
    (step,) = steps(TreeSource(cfg, params), scores_of(cfg, params, tokens), target)
    assert step.kept.width == tuple(np.setdiff1d(np.arange(cfg.width), gone))
    others = rng.integers(0, cfg.vocab_size, (2, 7)).astype(np.int32)
    found = logits(step.source.cfg, load_tree(step.source), others)
    np.testing.assert_allclose(found, logits(cfg, params, others), rtol=0, atol=1e-4)


def test_a_layer_that_does_nothing_goes_first():
    source = open_model(MODELS / 'qwen3').source
    cfg, params = source.cfg, jax.tree.map(np.array, load_tree(source))
    layer = params['layers'][0][0]
    for part, name in (('attn', 'out'), ('mlp', 'down')):
        layer[part][name]['kernel'][1] = 0
    tokens = np.arange(14, dtype=np.int32).reshape(2, 7)
    scores = scores_of(cfg, params, tokens)
    assert abs(scores.layers_L[1]) < 1e-6
    (step,) = steps(TreeSource(cfg, params), scores, Target(num_hidden_layers=cfg.num_layers - 1))
    assert step.layers == tuple(n for n in range(cfg.num_layers) if n != 1)
    found = logits(step.source.cfg, load_tree(step.source), tokens)
    np.testing.assert_allclose(found, logits(cfg, params, tokens), rtol=0, atol=2e-5)


def test_heads_that_have_keys_of_their_own_take_them_along():
    source = open_model(MODELS / 'llama_bias').source
    cfg, params = source.cfg, load_tree(source)
    scores = scores_of(cfg, params, np.arange(14, dtype=np.int32).reshape(2, 7))
    (step,) = steps(TreeSource(cfg, params), scores, Target(num_attention_heads=2))
    assert step.kept.heads == step.kept.kv_heads == tuple(tuple(sorted(np.argsort(-s)[:2])) for s in scores.heads_LN)


def test_all_steps_in_a_row_keep_what_matters_in_the_layers_that_stay():
    source = open_model(MODELS / 'llama').source
    cfg, params = source.cfg, load_tree(source)
    tokens = np.arange(14, dtype=np.int32).reshape(2, 7)
    scores = scores_of(cfg, params, tokens)
    heads, layers = cfg.num_kv_heads, (cfg.num_layers - 1,)
    target = Target(layers=layers, intermediate_size=7, num_attention_heads=heads, hidden_size=6 * heads)
    made = list(steps(TreeSource(cfg, params), scores, target))
    assert [step.name for step in made] == ['layers', 'MLP channels', 'heads', 'hidden dimensions']
    kept, small = made[-1].kept, made[-1].source.cfg
    assert (small.num_layers, small.num_heads, small.num_kv_heads, small.width) == (1, heads, heads, 6 * heads)
    assert kept.mlp == (tuple(sorted(np.argsort(-scores.mlp_LF[-1])[:7])),)
    assert kept.width == tuple(sorted(np.argsort(-scores.width_LD[-1])[: 6 * heads]))
    assert np.isfinite(logits(small, load_tree(made[-1].source), tokens)).all()


CASES = {
    'llama': [
        (Target(), 'nothing to prune: expected a smaller size'),
        (Target(layers=(0,), num_hidden_layers=1), '--layers and --num_hidden_layers=1: expected'),
        (Target(intermediate_size=9999), '--intermediate_size=9999: expected 1 to '),
        (Target(hidden_size=0), '--hidden_size=0: expected 1 to '),
        (Target(num_attention_heads=4), '--num_attention_heads=4 with num_key_value_heads=3: expected a multiple of 3'),
        (Target(hidden_size=7), 'hidden_size=7 with num_attention_heads=.*: transformers opens a llama only where'),
    ],
    'gemma2': [(Target(hidden_size=4), '--hidden_size=4: gemma2 multiplies embeddings by the root')],
    'nemotron_h_moe': [(Target(hidden_size=4), 'has experts: only whole layers of it can be left out')],
}


@pytest.mark.parametrize(('name', 'target', 'message'), [(n, *case) for n, cases in CASES.items() for case in cases])
def test_targets_that_are_none_are_refused(name, target, message):
    with pytest.raises(ValueError, match=message):
        check_target(open_model(MODELS / name).source.cfg, target)
