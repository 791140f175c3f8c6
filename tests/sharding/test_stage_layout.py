"""The stage layout against a list of layers dealt out by hand."""

import functools
import itertools

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpt.models.config import Experts
from jpt.sharding.layout import (
    Run,
    RunSegment,
    make_layout,
    run_of,
    slots_of,
    stage_bounds,
    take_run,
    to_canonical_layout,
    to_device_layout,
)

SIZES = {'pipe': 1, 'tensor': 1}


def tree_of(segments, vocab=5):
    """Parameters in which every layer's weight is the layer's number in the model; segments: (kinds, repeats)."""
    layers, number = [], 0
    for kinds, repeats in segments:
        numbers = number + np.arange(kinds * repeats).reshape(repeats, kinds)
        number += kinds * repeats
        layers.append([{'w': np.stack([numbers[:, kind]] * 2, axis=1).astype(np.float32)} for kind in range(kinds)])
    table = 1 + np.arange(2.0 * vocab).reshape(vocab, 2)
    return {'embed': {'embedding': table}, 'layers': layers, 'final_norm': {'scale': np.ones(2)}}


def numbers_of(run_layers):
    """The numbers of the layers of a run, in the order in which they run."""
    order = []
    for segment in run_layers:
        repeats = len(segment[0]['w'])
        order += [int(kind['w'][repeat, 0]) for repeat in range(repeats) for kind in segment]
    return order


def test_seven_layers_on_four_stages():
    layout = make_layout(tree_of([(1, 7)]), SIZES | {'pipe': 4})
    np.testing.assert_array_equal(np.diff(stage_bounds(layout)), [2, 2, 2, 1])
    placed = to_device_layout(layout, tree_of([(1, 7)]))['layers'][0][0]['w']
    assert placed.shape == (4, 1, 2, 2)
    np.testing.assert_array_equal(placed[:, 0, :, 0], [[0, 1], [2, 3], [4, 5], [6, 0]])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=3, max_size=9), st.integers(2, 4))
def test_the_costliest_stage_is_as_cheap_as_any_cut_makes_it(costs, pipe):
    pipe = min(pipe, len(costs))
    params = tree_of([(len(costs), 1)])
    params['layers'] = [[{'kernel': np.zeros((1, 1, cost), np.float32)} for cost in costs]]
    bounds = stage_bounds(make_layout(params, SIZES | {'pipe': pipe}))
    cuts = [(0, *inner, len(costs)) for inner in itertools.combinations(range(1, len(costs)), pipe - 1)]
    worst = [max(sum(costs[a:b]) for a, b in itertools.pairwise(cut)) for cut in cuts]
    assert tuple(bounds) in cuts
    assert worst[cuts.index(tuple(bounds))] == min(worst)


def test_a_layer_costs_the_experts_that_a_token_passes_through():
    """Eight experts of 30 elements, two of them for a token, and a router of 16: 76, as much as a dense layer of 76."""
    experts = {'router': {'kernel': np.zeros((1, 8, 2))}, 'experts': {'up': {'kernel': np.zeros((1, 8, 15, 2))}}}
    params = tree_of([(4, 1)])
    params['layers'] = [[{'mlp': experts}, *({'mlp': {'up': {'kernel': np.zeros((1, 38, n))}}} for n in (1, 1, 2))]]
    layout = make_layout(params, SIZES | {'pipe': 2}, experts=Experts(8, 2, 15))
    assert layout.costs == ((76, 38, 38, 76),)
    assert tuple(stage_bounds(layout)) == (0, 2, 4)


def test_chunks_go_round_the_ring():
    layout = make_layout(tree_of([(1, 8)]), SIZES | {'pipe': 2}, chunks=2)
    placed = to_device_layout(layout, tree_of([(1, 8)]))['layers'][0][0]['w']
    np.testing.assert_array_equal(placed[..., 0], [[[0, 1], [4, 5]], [[2, 3], [6, 7]]])


def test_a_stage_that_begins_within_a_period_gets_the_period_rotated():
    layout = make_layout(tree_of([(6, 4), (2, 1)]), SIZES | {'pipe': 4})
    assert run_of(layout, 0) == Run((RunSegment(tuple((0, kind) for kind in range(6)), 1), RunSegment(((0, 0),), 1)), 0)
    rotated = tuple((0, kind) for kind in (1, 2, 3, 4, 5, 0))
    assert run_of(layout, 1) == Run((RunSegment(rotated, 1), RunSegment(((0, 1),), 1)), 7)
    assert run_of(layout, 3).segments[-1] == RunSegment(((1, 0), (1, 1)), 1)


MODELS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3)


@settings(max_examples=80, deadline=None)
@given(MODELS, st.integers(1, 4), st.integers(1, 3))
def test_stages_run_all_layers_in_order_and_the_way_back_is_exact(segments, pipe, chunks):
    params = tree_of(segments)
    total = sum(kinds * repeats for kinds, repeats in segments)
    chunks = 1 if pipe == 1 else chunks
    if total < pipe * chunks:
        with pytest.raises(ValueError, match=f'{total} layers cannot fill'):
            make_layout(params, SIZES | {'pipe': pipe}, chunks)
        return
    layout = make_layout(params, {'pipe': pipe, 'tensor': 3}, chunks)
    placed = to_device_layout(layout, params)
    order = []
    for stage in range(layout.num_stages if layout.staged else 0):
        device, chunk = stage % pipe, stage // pipe
        mine = jax.tree.map(lambda leaf, at=(device, chunk): leaf[at], placed['layers'])
        run = run_of(layout, stage)
        numbers = numbers_of(take_run(mine, run))
        assert numbers[0] == run.first
        order += numbers
    assert order == (list(range(total)) if layout.staged else [])
    jax.tree.map(np.testing.assert_array_equal, to_canonical_layout(layout, placed), params)
    lengths = [len(run_of(layout, stage).segments) for stage in range(layout.num_stages)]
    assert all(lengths)


def test_empty_slots_are_zero_and_marked():
    layout = make_layout(tree_of([(1, 5)]), SIZES | {'pipe': 3})
    np.testing.assert_array_equal(slots_of(layout)[0, 0][:, 0], [[0, 1], [2, 3], [4, -1]])
    placed = to_device_layout(layout, jax.tree.map(lambda leaf: leaf + 1, tree_of([(1, 5)])))
    np.testing.assert_array_equal(placed['layers'][0][0]['w'][2, 0, 1], 0)


@pytest.mark.parametrize(('pipe', 'tensor', 'padded'), [(1, 1, 50257), (1, 8, 50264), (2, 4, 50264), (4, 1, 50260)])
def test_the_vocabulary_is_padded_to_what_the_mesh_divides(pipe, tensor, padded):
    params = tree_of([(1, 4)], vocab=50257)
    layout = make_layout(params, {'pipe': pipe, 'tensor': tensor})
    placed = to_device_layout(layout, params)
    table = placed['embed']['embedding']
    assert table.shape == (padded, 2)
    assert not table[50257:].any()
    np.testing.assert_array_equal(
        to_canonical_layout(layout, placed)['embed']['embedding'], params['embed']['embedding']
    )


def test_gradients_and_optimizer_states_are_laid_out_like_parameters_also_abstractly():
    params = tree_of([(2, 3)])
    layout = make_layout(params, {'pipe': 2, 'tensor': 3})
    state = optax.adam(1e-3).init(params)
    placed = to_device_layout(layout, state)
    assert placed[0].mu['layers'][0][1]['w'].shape == (2, 1, 2, 2)
    assert placed[0].nu['embed']['embedding'].shape == (6, 2)
    assert placed[0].count.shape == ()
    back = to_canonical_layout(layout, placed)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    abstract = jax.eval_shape(functools.partial(to_device_layout, layout), state)
    assert jax.tree.map(lambda leaf: leaf.shape, abstract) == jax.tree.map(lambda leaf: leaf.shape, placed)
    home = jax.eval_shape(functools.partial(to_canonical_layout, layout), abstract)
    assert jax.tree.map(lambda leaf: leaf.shape, home) == jax.tree.map(lambda leaf: leaf.shape, state)


def test_a_tree_in_the_wrong_layout_is_refused_by_name():
    params = tree_of([(1, 6)])
    layout = make_layout(params, {'pipe': 2, 'tensor': 3})
    placed = to_device_layout(layout, params)
    with pytest.raises(ValueError, match=r'embed/embedding has shape \(6, 2\): expected it to begin with \(5,\)'):
        to_device_layout(layout, {'embed': placed['embed']})
    with pytest.raises(ValueError, match=r'layers/0/0/w has shape \(6, 2\): expected it to begin with \(2, 1, 3\)'):
        to_canonical_layout(layout, {'layers': params['layers']})


def test_one_stage_and_a_vocabulary_that_divides_change_nothing():
    params = tree_of([(2, 3)])
    layout = make_layout(params, SIZES)
    assert to_device_layout(layout, params)['layers'][0][0]['w'] is params['layers'][0][0]['w']
    with pytest.raises(ValueError, match='chunks=2 with pipe=1'):
        make_layout(params, SIZES, chunks=2)
