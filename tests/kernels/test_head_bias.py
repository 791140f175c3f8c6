"""The head loss with a bias, under soft cap and temperature, against float64 numpy, on any chunks, blocks and mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jpt.kernels.distillation_loss import Teacher, distillation
from jpt.kernels.head_loss import linear_loss
from jpt.kernels.token_losses import cross_entropy

N, D, E, V = 24, 6, 5, 19
CAP, TEACHER_CAP, TEMPERATURE, ALPHA = 2.0, 3.0, 1.7, 0.6


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@functools.cache
def drawn():
    random = np.random.default_rng(11)
    shapes = {'hidden': (N, D), 'kernel': (V, D), 'bias': (V,)}
    shapes |= {'teacher_hidden': (N, E), 'teacher_kernel': (V, E), 'teacher_bias': (V,)}
    given = {name: random.normal(size=shape) for name, shape in shapes.items()}
    weights = random.random(N) * (random.random(N) < 0.7)
    return given | {'weights': weights, 'targets': random.integers(0, V, N).astype(np.int32)}


def softmax(x):
    grown = np.exp(x - x.max(-1, keepdims=True))
    return grown / grown.sum(-1, keepdims=True)


def capped(hidden, kernel, bias, cap):
    return cap * np.tanh((hidden @ kernel.T + bias) / cap)


def wanted(distilled):
    """Loss and gradients of hidden states, kernel and bias."""
    x = drawn()
    z = capped(x['hidden'], x['kernel'], x['bias'], CAP)
    hot = np.eye(V)[x['targets']]
    total, slope = -np.log((softmax(z) * hot).sum(-1)), softmax(z) - hot
    if distilled:
        t = capped(x['teacher_hidden'], x['teacher_kernel'], x['teacher_bias'], TEACHER_CAP)
        p, q = softmax(t / TEMPERATURE), softmax(z / TEMPERATURE)
        kl = (p * np.log(p / q)).sum(-1)
        total = ALPHA * TEMPERATURE**2 * kl + (1 - ALPHA) * total
        slope = ALPHA * TEMPERATURE * (q - p) + (1 - ALPHA) * slope
    inner = x['weights'][:, None] * slope * (1 - (z / CAP) ** 2)
    return (x['weights'] * total).sum(), inner @ x['kernel'], inner.T @ x['hidden'], inner.sum(0)


def found(distilled, *, pad=0, dtype='float64', sizes=None, **options):
    """The same by `linear_loss`: tokens without weight and padded rows hold garbage."""
    x = drawn()
    spoiled = {name: np.where((x['weights'] != 0)[:, None], x[name], np.nan) for name in ('hidden', 'teacher_hidden')}
    tables = {name: x[name] for name in ('kernel', 'bias', 'teacher_kernel', 'teacher_bias')}
    tables = {n: np.pad(v, [(0, pad)] + [(0, 0)] * (v.ndim - 1), constant_values=100.0) for n, v in tables.items()}
    args = {'targets': x['targets']} | ({'teacher_hidden': spoiled['teacher_hidden']} if distilled else {})
    shared = {name: tables[name] for name in ('teacher_kernel', 'teacher_bias')} if distilled else None
    loss = cross_entropy()
    if distilled:
        loss = distillation(alpha=ALPHA, temperature=TEMPERATURE, teachers=(Teacher(soft_cap=TEACHER_CAP),))

    def total(hidden, kernel, bias):
        given = {'vocab_size': V, 'soft_cap': CAP, 'bias_V': bias, 'shared': shared} | options
        return linear_loss(hidden, kernel, x['weights'], args, loss, **given)[0]

    given = (jnp.asarray(v, dtype) for v in (spoiled['hidden'], tables['kernel'], tables['bias']))
    sizes = sizes or {'data': 1}
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    with jax.set_mesh(mesh):
        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(*given)


def check(result, distilled, tolerance=1e-12):
    total, gradients = result
    expected, *others = wanted(distilled)
    assert float(total) == pytest.approx(expected, rel=tolerance)
    for name, ours, theirs in zip(('hidden', 'kernel', 'bias'), gradients, others, strict=True):
        ours = np.asarray(ours, np.float64)
        assert np.linalg.norm(ours[: len(theirs)] - theirs) < tolerance * np.linalg.norm(theirs), name
        assert not ours[len(theirs) :].any(), f'd{name}: padded rows must get no gradient'


@pytest.mark.parametrize('distilled', [False, True])
@pytest.mark.parametrize(
    'options',
    [
        {},
        {'chunk': 7, 'block': 2, 'pad': 3},
        {'chunk': 1, 'block': 24},
        {'pad': 1, 'chunk': 6, 'sizes': {'tensor': 2}},
        {'pad': 1, 'chunk': 4, 'sizes': {'data': 2, 'fsdp': 2, 'tensor': 2}},
    ],
)
def test_value_and_gradients_are_those_of_whole_logits(options, distilled):
    check(found(distilled, **options), distilled)


def test_in_float32_too_and_each_gradient_has_its_dtype():
    result = found(True, dtype='float32', chunk=5)
    check(result, True, 1e-5)
    assert [gradient.dtype for gradient in result[1]] == [jnp.float32] * 3


def plain(bias):
    """Cross-entropy without a cap, not differentiated."""
    x = drawn()
    operands = x['hidden'], x['kernel'], x['weights'], {'targets': x['targets']}, cross_entropy()
    return linear_loss(*operands, vocab_size=V, bias_V=bias)[0]


def test_no_bias_is_one_of_zeros():
    none, zero, other = (float(jax.jit(plain)(bias)) for bias in (None, np.zeros(V), drawn()['bias']))
    assert none == pytest.approx(zero, rel=1e-14)
    assert abs(other - zero) > 1e-2


def test_a_bias_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r'bias_V\.shape=\(18,\): expected \(19,\), as the kernel has'):
        plain(drawn()['bias'][1:])
