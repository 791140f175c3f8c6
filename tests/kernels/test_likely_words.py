"""The likeliest words from hidden states and head, against float64 numpy: options, chunks, dtypes and meshes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy_head_loss as reference
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jpt.kernels.likely_words import largest, likely_words, near_divisor

V = 31
TOLERANCE = {'float64': 1e-12, 'float32': 2e-6, 'bfloat16': 2e-6}
# Pairwise: number of words, top-p with its floor, temperature, cap, chunk, padded rows, dtype, mesh.
CASES = {
    'plain': {'count': 5},
    'one_word_cold_cap': {'count': 1, 'temperature': 0.6, 'soft_cap': 2.0, 'chunk': 7, 'pad': 1},
    'all_words': {'count': V, 'temperature': 2.0, 'chunk': 1, 'pad': 5},
    'bf16': {'count': 6, 'temperature': 1.5, 'chunk': 9, 'dtype': 'bfloat16'},
    'top_p': {'count': 12, 'top_p': 0.6, 'chunk': 22},
    'top_p_floor_f32': {'count': 9, 'top_p': 0.2, 'at_least': 3, 'temperature': 3.0, 'dtype': 'float32', 'pad': 2},
    'tensor': {'count': 5, 'temperature': 0.7, 'chunk': 8, 'pad': 1, 'mesh': {'tensor': 4}},
    # Five columns a shard, fewer than the words wanted; the last shard has padding only.
    'tensor_small_shards': {'count': 11, 'soft_cap': 3.0, 'pad': 9, 'mesh': {'tensor': 8}},
    'rows_f32': {'count': 4, 'top_p': 0.5, 'pad': 1, 'dtype': 'float32', 'mesh': {'data': 2, 'tensor': 2}},
    'pipe_fsdp': {'count': 7, 'temperature': 1.3, 'pad': 1, 'mesh': {'pipe': 2, 'fsdp': 2, 'tensor': 2}},
}


def in_numpy(case, count, *, temperature=1.0, top_p=None, at_least=1, soft_cap=None):
    """ids, log-probabilities, log tail and that of the next word, from all logits in float64."""
    logits = reference.capped_logits(case.hidden, case.kernel, soft_cap)[0]
    logp = reference.log_softmax(logits / temperature)
    ids = np.argsort(-logp, axis=-1, kind='stable')[:, :count]
    top = np.take_along_axis(logp, ids, axis=-1)
    for n in range(len(ids)):
        for j in range(count):
            if top_p is not None and j >= at_least and np.exp(logp[n, ids[n, :j]]).sum() >= top_p:
                ids[n, j:], top[n, j:] = -1, -np.inf
                break
    left = np.array([np.exp(np.delete(row, own[own >= 0])).sum() for row, own in zip(logp, ids, strict=True)])
    with np.errstate(divide='ignore'):
        return ids, top, np.log(left), logp[np.arange(len(logp)), case.targets]


def mesh_of(sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def filled(name):
    return {'pad': 0, 'dtype': 'float64', 'mesh': {}, **CASES[name]}


@functools.cache
def results(mesh):
    """What is found for all cases of a mesh (as sorted items), from one program."""
    names = [name for name in CASES if tuple(sorted(filled(name)['mesh'].items())) == mesh]
    apart = ('pad', 'dtype', 'mesh')
    options = {name: {k: v for k, v in filled(name).items() if k not in apart} for name in names}
    case = reference.draw()

    def arrays(name):
        rows = [(0, filled(name)['pad']), (0, 0)]
        kernel = np.pad(case.kernel, rows, constant_values=100.0)  # garbage that must not be taken
        return *(x.astype(jnp.dtype(filled(name)['dtype'])) for x in (case.hidden, kernel)), case.targets

    @jax.jit
    def run(operands):
        return {name: likely_words(*operands[name], vocab_size=V, **options[name]) for name in names}

    with jax.enable_x64(True), jax.set_mesh(mesh_of(dict(mesh))) if mesh else jax.enable_x64(True):
        return jax.tree.map(np.asarray, run({name: arrays(name) for name in names}))


@pytest.mark.parametrize('name', CASES)
def test_words_and_masses_equal_numpy(name):
    options = filled(name)
    dtype, found = jnp.dtype(options['dtype']), results(tuple(sorted(options['mesh'].items())))[name]
    case = reference.draw()
    rounded = case._replace(**{k: getattr(case, k).astype(dtype).astype(np.float64) for k in ('hidden', 'kernel')})
    given = {k: v for k, v in options.items() if k in ('temperature', 'top_p', 'at_least', 'soft_cap')}
    ids, logp, log_tail, sampled = in_numpy(rounded, options['count'], **given)
    np.testing.assert_array_equal(found.target.ids, ids)
    for got, wanted in ((found.target.logp, logp), (found.target.log_tail, log_tail), (found.sampled_logp, sampled)):
        assert got.dtype == np.promote_types(np.float32 if dtype == jnp.bfloat16 else dtype, np.float32)
        np.testing.assert_allclose(got, wanted, atol=TOLERANCE[options['dtype']], rtol=TOLERANCE[options['dtype']])


def test_a_tail_far_below_what_float32_leaves_of_one():
    """One word with all but e^-40 of the mass, over two shards: 1 - sum of probabilities would give 0."""
    kernel = np.zeros((6, 2), np.float32)
    kernel[4] = 40, 0
    hidden, next_ids = np.array([[1, 0], [0.5, 1]], np.float32), np.array([4, 0], np.int32)
    with jax.set_mesh(mesh_of({'tensor': 2})):
        found = jax.jit(functools.partial(likely_words, count=1, vocab_size=6))(hidden, kernel, next_ids)
    np.testing.assert_array_equal(found.target.ids, [[4], [4]])
    np.testing.assert_allclose(found.target.log_tail, [np.log(5) - 40, np.log(5) - 20], rtol=1e-6)
    np.testing.assert_allclose(found.sampled_logp, [0, -20], atol=1e-5)


def test_rows_and_sequence_over_a_mesh_inside_and_outside_of_a_shard_map():
    """[B, T, D] over data and context: automatic axes, and the same axes manual, give what one device gives."""
    case = reference.draw(3, N=24)
    hidden, next_ids = case.hidden.reshape(4, 6, -1), case.targets.reshape(4, 6)
    kernel = np.pad(case.kernel, [(0, 1), (0, 0)], constant_values=100.0)
    own = functools.partial(likely_words, count=4, vocab_size=V, temperature=1.2)
    with jax.enable_x64(True), jax.set_mesh(mesh_of({'data': 2, 'context': 2, 'tensor': 2})):
        inside = jax.shard_map(
            own,
            in_specs=(P('data', 'context'), P(), P('data', 'context')),
            out_specs=P('data', 'context'),
            axis_names={'data', 'context'},
            check_vma=False,
        )
        found = jax.jit(lambda *arrays: (own(*arrays), inside(*arrays)))(hidden, kernel, next_ids)
    ids, logp, log_tail, sampled = in_numpy(case, 4, temperature=1.2)
    for got in found:
        np.testing.assert_array_equal(got.target.ids.reshape(24, 4), ids)
        for one, wanted in ((got.target.logp, logp), (got.target.log_tail, log_tail), (got.sampled_logp, sampled)):
            np.testing.assert_allclose(np.reshape(one, wanted.shape), wanted, atol=1e-12)


def test_logits_exist_for_one_chunk_of_tokens():
    """2,048 tokens and 8,192 words in float32 are 64 MiB; a chunk of 128 is 4, and the copies that find its words."""
    shapes = ((2048, 16), jnp.float32), ((8192, 16), jnp.float32), ((2048,), jnp.int32)
    run = functools.partial(likely_words, count=64, vocab_size=8192, chunk=128)
    compiled = jax.jit(run).lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 32 * 2**20


def test_counts_that_no_vocabulary_has():
    hidden, kernel, next_ids = np.zeros((2, 3)), np.zeros((8, 3)), np.zeros(2, np.int32)
    for count in (0, 8):
        with pytest.raises(ValueError, match=rf'count={count}: expected 1 to 7, the size of the vocabulary'):
            likely_words(hidden, kernel, next_ids, count=count, vocab_size=7)


@pytest.mark.parametrize(('length', 'count'), [(4096, 16), (2000, 5), (600, 1), (6, 6), (127, 5), (64, 64)])
def test_the_largest_numbers_by_blocks_are_those_of_a_stable_sort(length, count):
    """With many equal numbers and -inf among them, in any of 50 rows."""
    random = np.random.default_rng(length + count)
    x = random.integers(0, 9, (50, length)).astype(np.float32)
    x[random.random(x.shape) < 0.2] = -np.inf
    values, columns = jax.jit(largest, static_argnums=1)(x, count)
    order = np.argsort(-x, axis=-1, kind='stable')[:, :count]
    np.testing.assert_array_equal(values, np.take_along_axis(x, order, axis=-1))
    np.testing.assert_array_equal(columns, order)


def test_published_vocabularies_are_searched_by_blocks():
    """At most an eighth of the numbers is sorted for 64 words of any of these tables."""
    for length in (32000, 32064, 49152, 50257, 100352, 128256, 131072, 151936, 152064, 248320, 256000, 262144):
        block = near_divisor(length, math.sqrt(length / 64))
        assert length // block + 64 * block <= length / 8, length
