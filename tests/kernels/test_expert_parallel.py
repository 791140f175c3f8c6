"""The mixture of experts on meshes against the plain sum over experts, in float64: values, gradients, rounds."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jpt.kernels import ragged_exchange
from jpt.kernels.expert_parallel import SPECS, Rows, mixture
from jpt.kernels.grouped_matmul import grouped_matmul
from jpt.kernels.ragged_exchange import FORMS
from jpt.sharding.mesh import AXES, MeshConfig, make_mesh

B, T, J, D, F = 8, 16, 2, 6, 8


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def run(kernels, rows):
    """The experts, each row with a copy of its own expert's weights; rows beyond all give 0."""
    ends = jnp.cumsum(rows.sizes_E)
    row = jnp.arange(rows.x_MD.shape[0])
    mine = (row[:, None] < ends[None]) & (row[:, None] >= (ends - rows.sizes_E)[None])
    mine = mine.astype(rows.x_MD.dtype)

    def linear(name, x):
        y = jnp.einsum('me,eoi,mi->mo', mine, kernels[name], x)
        return y + rows.of_expert(kernels[f'{name}_bias']) if f'{name}_bias' in kernels else y

    return linear('down', jnp.tanh(linear('gate', rows.x_MD)) * linear('up', rows.x_MD))


def emulated(x, output, begins, sizes, places, arriving, axis):
    """`lax.ragged_all_to_all` as documented, from what all shards have: places are offsets in the receivers' outputs.

    Sizes that do not agree give no numbers.
    """
    me = jax.lax.axis_index(axis)
    operands, begins, sizes, places = jax.lax.all_gather((x, begins, sizes, places), axis)
    row = jnp.arange(len(output))
    for sender, operand in enumerate(operands):
        size, place = sizes[sender, me], places[sender, me]
        rows = operand[jnp.clip(begins[sender, me] + row - place, 0, len(operand) - 1)]
        rows = jnp.where(size == arriving[sender], rows, jnp.nan)
        output = jnp.where(((row >= place) & (row < place + size))[:, None], rows, output)
    return output


@pytest.fixture
def as_on_gpu(monkeypatch):
    """The exchange that a GPU gets, with its collective replaced."""
    monkeypatch.setattr(ragged_exchange, 'platform', lambda: 'gpu')
    monkeypatch.setattr(ragged_exchange, 'ragged_all_to_all', emulated)


def weights_of(count, biases=True):
    random = np.random.default_rng(count)
    shapes = {'up': (F, D), 'gate': (F, D), 'down': (D, F)}
    if biases:
        shapes |= {'up_bias': (F,), 'gate_bias': (F,), 'down_bias': (D,)}
    return {name: random.normal(size=(count, *shape)) for name, shape in shapes.items()}


def inputs(count, batch=B):
    random = np.random.default_rng(7)
    x, cotangent = random.normal(size=(2, batch, T, D))
    return x, random.normal(size=(batch, T, J)), weights_of(count), cotangent


def plain(x, ids, weights, k, on_input):
    """sum_j weights[j] * expert ids[j] (x), from what all experts make of all tokens, on one device."""
    each, chosen = jnp.ones_like(weights), jax.nn.one_hot(ids, len(k['up']), dtype=x.dtype)
    read, weigh = (weights, each) if on_input else (each, weights)
    x_BTJD = read[..., None] * x[:, :, None]

    def linear(name, spec, x):
        return jnp.einsum(spec, x, k[name]) + k[f'{name}_bias'][None, None, None]

    up, gate = linear('up', 'btji,eoi->btjeo', x_BTJD), linear('gate', 'btji,eoi->btjeo', x_BTJD)
    y = linear('down', 'btjei,eoi->btjeo', jnp.tanh(gate) * up)
    return jnp.einsum('btj,btje,btjeo->bto', weigh, chosen, y)


@functools.partial(jax.jit, static_argnums=5)
def plain_with_gradients(x, ids, weights, kernels, cotangent, on_input):
    value, pull = jax.vjp(lambda *given: plain(given[0], ids, *given[1:], on_input), x, weights, kernels)
    return value, pull(cotangent)


def routers(count, batch=B):
    """Choices by name: even, random, all to the first or the last shard's experts, and some or all to nobody."""
    random = np.random.default_rng(count)
    shape = (batch, T, J)
    even = np.arange(math.prod(shape)).reshape(shape) % count
    mixed = np.stack([random.permutation(count)[:J] for _ in range(batch * T)]).reshape(shape)
    some = np.where(random.random((batch, T, 1)) < 0.4, count, mixed)
    some[1], some[2, :, 1] = count, count
    found = {'even': even, 'random': mixed, 'first': 0 * even, 'last': 0 * even + count - 1, 'some to nobody': some}
    found['nobody'] = 0 * even + count
    return {name: ids.astype(np.int32) for name, ids in found.items()}


def late_by_hand(ids, rows, context, shards, count, factor, ragged=False):
    """Rows beyond the room of the first round: of every device for every shard of experts, or of each group of them."""
    late = 0
    parts = [[part.reshape(-1) for part in np.split(row, context, axis=1)] for row in np.split(ids, rows)]
    for column in zip(*parts, strict=True):
        for group in [column[at : at + shards] for at in range(0, rows, shards)]:
            for shard in range(shards):
                own = range(shard * count // shards, (shard + 1) * count // shards)
                loads = [sum(expert in own for expert in experts.tolist()) for experts in group]
                total = len(group[0])
                if ragged:
                    late += max(sum(loads) - min(total * shards, 8 * math.ceil(factor * total / 8)), 0)
                else:
                    room = min(total, 8 * math.ceil(factor * total / shards / 8))
                    late += sum(max(load - room, 0) for load in loads)
    return late


def check(step, case):
    """Every router in one compiled program."""
    x, weights, kernels, cotangent = inputs(case.count, case.batch)
    shards, context = case.sizes.get('expert', 1), case.sizes.get('context', 1)
    rows = math.prod(case.sizes.get(axis, 1) for axis in ('data', 'fsdp', 'expert'))
    for name, ids in routers(case.count, case.batch).items():
        value, late, gradients = step(x, ids, weights, kernels, cotangent)
        wanted = plain_with_gradients(x, ids, weights, kernels, cotangent, case.on_input)
        found, structure = jax.tree.flatten((value, gradients))
        assert structure == jax.tree.structure(wanted)
        for one, other in zip(found, jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * max(1, np.abs(other).max()), err_msg=name)
        by_hand = (ids, rows, context, shards, case.count, case.factor, case.ragged)
        assert float(late) == (late_by_hand(*by_hand) if case.divides else 0), name


class Case(NamedTuple):
    sizes: dict[str, int]
    count: int
    factor: float = 1.5
    batch: int = B
    on_input: bool = False
    ragged: bool = False

    @property
    def divides(self):
        return self.batch == B

    @property
    def mesh(self):
        return make_mesh(MeshConfig(**{'data': 1} | self.sizes))

    def mixture(self, x, ids, weights, kernels, cotangent):
        """Value, late rows, and gradients in x, weights and kernels."""

        def function(x, weights, kernels):
            options = {'on_input': self.on_input, 'factor': self.factor, 'exchange': FORMS[self.ragged]}
            return mixture(run, x, ids, weights, kernels, self.count, **options)

        value, pull, late = jax.vjp(function, x, weights, kernels, has_aux=True)
        return value, late, pull(cotangent)


TOKENS = P(('data', 'fsdp', 'expert'), 'context')
AUTOMATIC = {
    'exchange': Case({'expert': 4, 'context': 2}, 8, 1.0),
    'with-tensor': Case({'fsdp': 2, 'expert': 2, 'tensor': 2}, 6, 8.0),
    'replicated': Case({'expert': 4, 'tensor': 2}, 8, batch=3, on_input=True),
    'tensor-only': Case({'data': 4, 'tensor': 2}, 3),
}


def automatic(case):
    token = NamedSharding(case.mesh, TOKENS if case.divides else P())
    experts = {kernel: NamedSharding(case.mesh, SPECS[kernel]) for kernel in weights_of(case.count)}
    with jax.set_mesh(case.mesh):
        step = jax.jit(case.mixture, in_shardings=(token, token, token, experts, token))
        check(step, case)


@pytest.mark.parametrize('name', AUTOMATIC)
def test_automatic_axes(name):
    """Under `jax.jit`: tokens and experts lie divided, and nothing of a mesh is said."""
    automatic(AUTOMATIC[name])


@pytest.mark.parametrize('factor', [1.0, 8.0])
def test_automatic_axes_as_on_a_gpu(factor, as_on_gpu):
    """Room for an even share, so that crowds wait for further rounds, and room for all of them."""
    automatic(Case({'expert': 4, 'context': 2}, 8, factor, ragged=True))


MANUAL = {
    'one-expert-each': Case({'data': 2, 'expert': 4}, 4),
    'expert-tensor': Case({'data': 2, 'expert': 2, 'tensor': 2}, 6, 1.0, on_input=True),
}


def inside_a_shard_map(case):

    def body(*given):
        value, late, (x, weights, kernels) = case.mixture(*given)
        return value, jax.lax.psum(late, ('data', 'expert')), (x, weights, jax.lax.psum(kernels, 'data'))

    experts = dict.fromkeys(weights_of(case.count), P('expert'))
    mapped = jax.shard_map(
        body,
        mesh=case.mesh,
        in_specs=(TOKENS, TOKENS, TOKENS, experts, TOKENS),
        out_specs=(TOKENS, P(), (TOKENS, TOKENS, experts)),
        axis_names=set(AXES) - {'tensor'},
        check_vma=False,
    )
    check(jax.jit(mapped), case)


@pytest.mark.parametrize('name', MANUAL)
def test_inside_a_shard_map(name):
    """All axes manual but `tensor`, as in a training step: kernels are a shard's own, their gradients summed here."""
    inside_a_shard_map(MANUAL[name])


def test_inside_a_shard_map_as_on_a_gpu(as_on_gpu):
    inside_a_shard_map(MANUAL['expert-tensor']._replace(ragged=True))


def test_a_crowd_is_late_by_all_that_the_first_round_has_no_room_for():
    """Checks the count by hand: 8 devices with 32 rows, all to one shard of 4, with room for 8; three more rounds."""
    ids = routers(8)['first']
    assert late_by_hand(ids, 4, 2, 4, 8, 1.0) == 8 * (32 - 8)
    assert late_by_hand(ids, 4, 2, 4, 8, 1.1) == 8 * (32 - 16)
    assert late_by_hand(ids, 4, 2, 4, 8, 8.0) == 0
    assert late_by_hand(ids, 4, 2, 4, 8, 1.1, ragged=True) == 2 * (4 * 32 - 40)


def test_rows_of_nobody_have_no_values():
    rows = Rows(jnp.zeros((6, 1)), jnp.asarray([2, 0, 3]))
    values = rows.of_expert(jnp.asarray([[1.0], [2.0], [3.0]]))
    np.testing.assert_array_equal(values[:, 0], [1, 1, 3, 3, 3, 0])


def test_the_result_has_the_dtype_of_what_the_experts_return():
    x = jnp.full((1, 2, D), 2.0**15, jnp.float16)
    ids, ones = jnp.zeros((1, 2, 1), jnp.int32), jnp.ones((1, 2, 1), jnp.float16)
    kernels = {'up': jnp.ones((1, F, D), jnp.float16)}
    found, _ = mixture(lambda _, rows: jnp.square(rows.x_MD.astype(jnp.float32)), x, ids, ones, kernels, 1)
    np.testing.assert_array_equal(found, np.full((1, 2, D), 2.0**30))  # more than float16 holds


@pytest.mark.parametrize(
    ('count', 'held', 'message'),
    [
        (6, 6, r'6 experts do not divide over expert=4: expected a multiple'),
        (8, 4, r"experts' down has shape \(4, 6, 8\): expected kernels of 8 experts"),
    ],
)
def test_experts_that_do_not_fit_are_refused(count, held, message):
    case, (x, weights, _, cotangent) = Case({'data': 2, 'expert': 4}, count), inputs(count)
    with jax.set_mesh(case.mesh), pytest.raises(ValueError, match=message):
        case.mixture(x, routers(count)['even'], weights, weights_of(held), cotangent)


@pytest.mark.parametrize('form', FORMS)
def test_late_rounds_keep_no_copies_of_the_kernels_for_the_backward_pass(form, monkeypatch):
    """A round that an even router does not need must not make the scan stack what it would read."""
    monkeypatch.setattr(ragged_exchange, 'platform', lambda: 'gpu' if form == 'ragged' else 'cpu')
    mesh = make_mesh(MeshConfig(data=1, expert=4, tensor=2))
    kernels = {'up': jnp.ones((8, 10, 6)), 'down': jnp.ones((8, 6, 10))}
    x, ids, weights = jnp.ones((4, 32, 6)), jnp.zeros((4, 32, 2), jnp.int32), jnp.ones((4, 32, 2))

    def run(kernels, rows):
        return grouped_matmul(grouped_matmul(rows.x_MD, kernels['up'], rows.sizes_E), kernels['down'], rows.sizes_E)

    def loss(x, kernels):
        return jnp.sum(mixture(run, x, ids, weights, kernels, 8, exchange=form)[0] ** 2)

    with jax.set_mesh(mesh):
        text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, kernels))
    assert '[2,5,6]' in text, 'the kernels of a shard'
    assert ('ragged_all_to_all' in text) == (form == 'ragged')
    rounds = 3  # 64 rows of a shard, 24 to a shard in a round, or 96 from all
    for stacked in (f'[{rounds - 1},2,5,6]', f'[{rounds - 1},2,6,5]', f'[{rounds - 1},64,6]', f'[{rounds - 1},96,6]'):
        assert stacked not in text
