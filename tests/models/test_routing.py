"""Choices against the golden models and plain numpy; the balance losses against loops over documents."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from jpt.kernels.expert_balance import batch_balance, load_everywhere
from jpt.models.config import Experts
from jpt.models.families import config_from_hf
from jpt.models.routing import Choice, choose, router_sums, within_capacity
from jpt.sharding.mesh import MeshConfig, make_mesh

MODELS = pathlib.Path(__file__).parents[1] / 'golden' / 'models'
ROUTED = sorted(path.name for path in MODELS.iterdir() if 'num_experts_per_tok' in (path / 'config.json').read_text())


chosen_by = jax.jit(choose, static_argnums=0)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def test_every_golden_model_with_experts_is_looked_at():
    families = {name.split('_plain')[0].split('_mixed')[0].split('_window')[0] for name in ROUTED}
    assert families >= {'qwen3_moe', 'mixtral', 'deepseek_v3', 'gpt_oss'}


@pytest.mark.parametrize('name', ROUTED)
def test_choices_are_those_of_transformers(name):
    cfg = config_from_hf(json.loads((MODELS / name / 'config.json').read_text()))
    tensors = {k: v for file in (MODELS / name).glob('*.safetensors') for k, v in load_file(file).items()}
    golden = np.load(MODELS / name / 'golden.npz')
    layers = [layer for layer, kind in enumerate(cfg.layer_kinds()) if kind.experts]
    assert layers == sorted(int(key.split('_')[-1]) for key in golden.files if key.startswith('router_logits_'))
    for layer in layers:
        biases = [v for k, v in tensors.items() if f'.layers.{layer}.' in k and 'e_score_correction_bias' in k]
        correction = biases[0] if biases else None
        assert (correction is not None) == cfg.experts.corrected
        chosen = chosen_by(cfg.experts, jnp.asarray(golden[f'router_logits_{layer}']), correction)
        np.testing.assert_array_equal(chosen.ids_MJ, golden[f'router_top_{layer}'])
        np.testing.assert_allclose(chosen.weights_MJ, golden[f'router_weights_{layer}'], rtol=1e-5, atol=1e-7)


def by_hand(experts, logits, correction):
    """(ids, weights) of one token in float64, as DeepSeek-V3 says it, one number after the other."""
    logits = [float(x) for x in logits]
    if experts.scoring == 'softmax':
        total = sum(np.exp(x) for x in logits)
        scores = [np.exp(x) / total for x in logits]
    else:
        scores = [1 / (1 + np.exp(-x)) for x in logits]
    ranked = [score + bias for score, bias in zip(scores, correction, strict=True)]
    size = experts.count // experts.groups
    groups = [range(g * size, (g + 1) * size) for g in range(experts.groups)]
    worth = [sum(sorted(ranked[e] for e in group)[-2:]) for group in groups]
    kept = sorted(range(experts.groups), key=lambda g: -worth[g])[: experts.top_groups]
    allowed = [e for g in kept for e in groups[g]]
    ids = sorted(allowed, key=lambda e: -ranked[e])[: experts.per_token]
    weights = np.array([scores[e] for e in ids])
    return ids, experts.scale * (weights / weights.sum() if experts.normalized else weights)


RULES = {
    'softmax': Experts(6, 3, 1),
    'softmax-raw-scaled': Experts(6, 2, 1, normalized=False, scale=2.5),
    'sigmoid-raw': Experts(6, 1, 1, 'sigmoid', normalized=False),
    'sigmoid-corrected': Experts(8, 3, 1, 'sigmoid', scale=1.7, corrected=True),
    'groups': Experts(12, 4, 1, 'sigmoid', groups=4, top_groups=2, corrected=True),
    'groups-of-one': Experts(4, 2, 1, 'softmax', groups=4, top_groups=2),
    'all-groups': Experts(6, 4, 1, 'softmax', groups=3, top_groups=3, corrected=True),
    'all-experts': Experts(3, 3, 1, 'sigmoid'),
}


@pytest.mark.parametrize('rule', RULES)
def test_choices_and_weights_by_hand(rule):
    experts = RULES[rule]
    random = np.random.default_rng(len(rule))
    logits = random.normal(size=(40, experts.count))
    correction = random.normal(size=experts.count) if experts.corrected else None
    chosen = chosen_by(experts, logits, correction)
    wanted = [by_hand(experts, row, np.zeros(experts.count) if correction is None else correction) for row in logits]
    np.testing.assert_array_equal(chosen.ids_MJ, [ids for ids, _ in wanted])
    np.testing.assert_allclose(chosen.weights_MJ, [weights for _, weights in wanted], rtol=1e-12)
    assert chosen.weights_MJ.dtype == np.float64
    if correction is not None:
        assert np.any(chosen.ids_MJ != chosen_by(experts, logits, np.zeros(experts.count)).ids_MJ)


def test_a_correction_moves_choices_and_has_no_gradient():
    """Weights move with the logits of the chosen only (not normalized: each with its own)."""
    experts = Experts(4, 2, 1, 'sigmoid', normalized=False, corrected=True)
    logits, correction = jnp.asarray([[2.0, 1.0, 0.0, -1.0]]), jnp.asarray([0.0, 0.0, 0.0, 5.0])

    def total(logits, correction):
        chosen = choose(experts, logits, correction)
        return jnp.sum(chosen.weights_MJ), chosen.ids_MJ

    (d_logits, d_correction), ids = jax.grad(total, (0, 1), has_aux=True)(logits, correction)
    np.testing.assert_array_equal(ids, [[3, 0]])
    np.testing.assert_array_equal(d_correction, np.zeros(4))
    score = 1 / (1 + np.exp(-np.asarray(logits)))
    np.testing.assert_allclose(d_logits, score * (1 - score) * [[1, 0, 0, 1]], rtol=1e-12)


def test_weights_of_scores_that_are_all_zero_are_zero():
    """exp(-200) is 0 in float32, and 0 / 0 is no weight."""
    chosen = chosen_by(Experts(4, 2, 1, 'sigmoid'), np.full((1, 4), -200, np.float32))
    np.testing.assert_array_equal(chosen.weights_MJ, np.zeros((1, 2)))


# Two documents and padding in row 0, another two in row 1.
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 2, 2, 2, 2, 2, 0, 0]], np.int32)
REAL = SEGMENTS.reshape(-1) > 0
RULE = Experts(6, 2, 1, 'sigmoid')


def over_text(choice, segments):
    """The balance of each text, as a layer reports it."""
    return router_sums(jnp.zeros_like(choice.scores_ME), choice, segments).balance


def over_batch(choice, segments):
    """The balance of all tokens of all devices, from what a layer reports."""
    sums = router_sums(jnp.zeros_like(choice.scores_ME), choice, segments)
    return batch_balance(load_everywhere(sums.load)[None], sums.share[None])


def random_choice(seed):
    logits = np.random.default_rng(seed).normal(size=(SEGMENTS.size, RULE.count))
    return logits, chosen_by(RULE, logits)


def balance_by_hand(scores, ids, segments):
    """The sum over documents of n * sum_e f_e P_e (DeepSeek-V3, equations 17 to 20)."""
    total, (rows, length), count = 0.0, segments.shape, scores.shape[-1]
    scores, ids = np.asarray(scores).reshape(rows, length, -1), np.asarray(ids).reshape(rows, length, -1)
    for row in range(rows):
        for text in set(segments[row].tolist()) - {0}:
            places = [t for t in range(length) if segments[row, t] == text]
            n = len(places)
            for e in range(count):
                f = count / (ids.shape[-1] * n) * sum(e in ids[row, t] for t in places)
                p = sum(scores[row, t, e] / scores[row, t].sum() for t in places) / n
                total += n * f * p
    return total


def test_balance_is_the_sum_over_documents_however_they_lie():
    """Two to a row, with garbage in the padding; all in one row, in another order; each in a row of its own."""
    logits, choice = random_choice(0)
    wanted = balance_by_hand(choice.scores_ME, choice.ids_MJ, SEGMENTS)
    parts = [logits.reshape(2, 8, -1)[row][SEGMENTS[row] == text] for row, text in ((1, 2), (0, 2), (1, 1), (0, 1))]
    lengths = np.array([len(part) for part in parts])
    assert sorted(lengths) == [1, 3, 4, 5]
    garbage = 50.0 * np.arange(RULE.count)
    forms = np.full((3, 4, 16, RULE.count), garbage)
    segments = np.zeros((3, 4, 16), np.int32)
    segments[0, :2, :8] = SEGMENTS
    forms[0, :2, :8][SEGMENTS > 0] = logits[REAL]
    segments[1, 2, : lengths.sum()] = np.repeat([1, 2, 3, 4], lengths)
    forms[1, 2, : lengths.sum()] = np.concatenate(parts)
    for row, part in enumerate(parts):
        segments[2, row, : len(part)] = 7 - row  # any id that is not 0
        forms[2, row, : len(part)] = part

    @jax.jit
    def value(logits, segments):
        return over_text(choose(RULE, logits.reshape(-1, RULE.count)), segments)

    for number in range(3):
        np.testing.assert_allclose(value(forms[number], segments[number]), wanted, rtol=1e-12)


def test_balance_of_an_even_text_is_one_per_token():
    """Every expert is chosen by as many tokens, or every score is the same: sum_e f_e P_e = 1."""
    ids = np.array([[0, 1], [2, 3], [4, 5], [0, 1], [2, 3], [4, 5]])
    ones = np.ones((2, 3), np.int32)
    both = jax.jit(lambda choice: (over_text(choice, ones[:1].repeat(2, 1)), over_batch(choice, ones)))
    for scores in (np.ones((6, 6)), np.random.default_rng(1).random((6, 6)) + 0.1):
        np.testing.assert_allclose(both(Choice(ids, np.ones((6, 2)), scores)), 6, rtol=1e-12)
    crowd = np.tile([0, 1], (6, 1))  # two of six have all tokens, and half of the score each
    np.testing.assert_allclose(
        both(Choice(crowd, np.ones((6, 2)), np.tile([0.5, 0.5, 0, 0, 0, 0], (6, 1)))), 18, rtol=1e-12
    )


@pytest.mark.parametrize('form', [over_text, over_batch])
def test_the_gradient_of_balance_is_that_of_the_scores_at_a_fixed_load(form):
    logits, choice = random_choice(2)

    @jax.jit
    def both(logits, direction, step):
        """The gradient; and the value beside, with the choice, and so f, of the point in the middle."""
        moved = choose(RULE, logits + step * direction)
        gradient = jax.grad(lambda logits: form(choose(RULE, logits), jnp.asarray(SEGMENTS)))(logits)
        return gradient, form(choice._replace(scores_ME=moved.scores_ME), jnp.asarray(SEGMENTS))

    direction, step = np.random.default_rng(3).normal(size=logits.shape), 1e-6
    (gradient, above), (_, below) = both(logits, direction, step), both(logits, direction, -step)
    assert not np.asarray(gradient)[~REAL].any()
    assert np.sum(gradient * direction) == pytest.approx(float(above - below) / (2 * step), rel=1e-7)


def batch_balance_by_hand(scores, ids):
    """n * sum_e f_e P_e of the n real tokens of SEGMENTS."""
    scores, ids, n, total = scores[REAL], ids[REAL], REAL.sum(), 0.0
    for e in range(RULE.count):
        f = RULE.count / (RULE.per_token * n) * np.sum(ids == e)
        total += n * f * np.mean(scores[:, e] / scores.sum(axis=1))
    return total


def test_batch_balance_is_its_formula():
    _, choice = random_choice(4)
    scores, ids = np.asarray(choice.scores_ME), np.asarray(choice.ids_MJ)
    wanted = batch_balance_by_hand(scores, ids)
    np.testing.assert_allclose(jax.jit(over_batch)(choice, SEGMENTS), wanted, rtol=1e-12)
    assert abs(wanted - balance_by_hand(scores, ids, SEGMENTS)) > 1e-3


@pytest.mark.parametrize('name', [name for name in ROUTED if name.startswith(('qwen3_moe', 'mixtral'))])
def test_batch_balance_is_the_loss_of_transformers(name):
    """Theirs is of all layers' tokens as one batch, per token, and its f_e add up to the number of choices."""
    cfg = config_from_hf(json.loads((MODELS / name / 'config.json').read_text()))
    golden = np.load(MODELS / name / 'golden.npz')
    layers = [golden[key] for key in sorted(golden.files) if key.startswith('router_logits_')]
    choice = chosen_by(cfg.experts, np.concatenate(layers))
    tokens = choice.ids_MJ.shape[0]
    ours = jax.jit(over_batch)(choice, np.ones((1, tokens), np.int32)) / tokens
    np.testing.assert_allclose(cfg.experts.per_token * ours, golden['aux_loss'], rtol=1e-5)


def test_sums_on_a_mesh_are_those_of_one_device():
    """Rows over data, and every text in two parts over context: f_e is that of the whole text, or of the batch."""
    logits, choice = random_choice(5)
    mesh = make_mesh(MeshConfig(data=2, context=2), jax.devices()[:4])

    def sums(logits, segments):
        logits = logits.reshape(-1, RULE.count)
        chosen = choose(RULE, logits)
        return jax.lax.psum((router_sums(logits, chosen, segments), over_batch(chosen, segments)), ('data', 'context'))

    place = P('data', 'context')
    mapped = jax.shard_map(sums, mesh=mesh, in_specs=(place, place), out_specs=P(), check_vma=False)
    found, batch = jax.jit(mapped)(logits.reshape(2, 8, -1), SEGMENTS)
    scores, ids = np.asarray(choice.scores_ME), np.asarray(choice.ids_MJ)
    np.testing.assert_allclose(found.balance, balance_by_hand(scores, ids, SEGMENTS), rtol=1e-12)
    np.testing.assert_allclose(batch, batch_balance_by_hand(scores, ids), rtol=1e-12)
    np.testing.assert_allclose(found.z, sum(np.log(np.exp(row).sum()) ** 2 for row in logits[REAL]), rtol=1e-12)
    np.testing.assert_array_equal(found.load, [np.sum(ids[REAL] == e) for e in range(RULE.count)])
    shares = scores[REAL] / scores[REAL].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.share, shares.sum(axis=0), rtol=1e-12)


def kept_by_hand(ids, count, room):
    """First choices of all tokens before any second one; an expert takes `room`, and the rest becomes `count`."""
    left, kept = [room] * count + [0], ids.copy()
    for choice in range(ids.shape[1]):
        for token in range(ids.shape[0]):
            expert = ids[token, choice]
            kept[token, choice] = expert if left[expert] > 0 else count
            left[expert] -= 1
    return kept


@pytest.mark.parametrize(('capacity', 'room'), [(1.0, 5), (0.1, 1), (1.3, 7), (9.0, 45)])
def test_capacity_drops_what_comes_last(capacity, room):
    """Ten tokens of two choices, four experts: an even share is 5 rows; id 4 stands for padding."""
    random = np.random.default_rng(int(10 * capacity))
    ids = np.array([random.permutation(4)[:2] for _ in range(10)])
    ids[[2, 7]] = 4
    ids[:2, 0] = ids[3:6, 1] = 0  # a crowd at one expert
    found = jax.jit(within_capacity, static_argnums=0)(Experts(4, 2, 1, capacity=capacity), ids)
    np.testing.assert_array_equal(found, kept_by_hand(ids, 4, room))
    if room < 5:
        assert np.any(np.asarray(found) != ids)
    if room == 45:
        np.testing.assert_array_equal(found, ids)


def test_first_choices_go_before_second_ones_and_padding_takes_no_room():
    experts = Experts(2, 2, 1, capacity=0.5)  # room for two rows each
    ids = jnp.asarray([[0, 1], [2, 2], [0, 1], [1, 0]])  # token 1 is padding
    np.testing.assert_array_equal(within_capacity(experts, ids), [[0, 1], [2, 2], [0, 2], [1, 2]])
    assert within_capacity(Experts(2, 2, 1), ids) is ids
