"""The mixture of experts as a module, against a loop over tokens in float64; what it keeps, and in which dtypes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jpt.kernels.grouped_matmul import PRODUCT
from jpt.models.block import remat_policy
from jpt.models.config import ClampedGate, Experts, LayerKind, ModelConfig, Rope, Segment
from jpt.models.moe import MoE, Router
from jpt.sharding.fsdp import gather, keep_activations
from jpt.sharding.mesh import MeshConfig, make_mesh

B, T, D, F = 2, 7, 10, 6
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1]], np.int32)
REAL = SEGMENTS > 0


def config(experts, **more):
    kind = LayerKind(Rope(), experts=True)
    return ModelConfig('qwen3_moe', 32, D, 2, 1, 8, (Segment((kind,), 1),), T, experts=experts, **more)


MODELS = {
    'plain': config(Experts(5, 2, F)),
    'biases-clamped': config(Experts(4, 2, F, biases=True), clamped_gate=ClampedGate(1.3, 0.9)),
    'shared-corrected': config(
        Experts(6, 3, F, 'sigmoid', scale=1.7, corrected=True, groups=3, top_groups=2, shared_width=9)
    ),
    'no-gate-on-input': config(
        Experts(4, 2, F, 'sigmoid', normalized=False, on_input=True), gated_mlp=False, activation='relu'
    ),
    'capacity': config(Experts(4, 2, F, capacity=0.7)),
}


@pytest.fixture
def double_precision():
    with jax.enable_x64(True):
        yield


def random_params(cfg, seed=1):
    """Weights [out, in] of which every one matters, as float64 numpy arrays."""
    shapes = jax.eval_shape(lambda: MoE(cfg).init(jax.random.key(0), jnp.zeros((1, 1, D)), jnp.ones((1, 1), jnp.int32)))
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape), shapes)['params']


def random_input(seed=2):
    return np.random.default_rng(seed).normal(size=(B, T, D))


def unit(cfg, k, e, x):
    """One expert (or, with e = (), the MLP of all tokens) on one token."""

    def linear(name, x):
        return k[name]['kernel'][e] @ x + (k[name]['bias'][e] if 'bias' in k[name] else 0)

    up = linear('up', x)
    if not cfg.gated_mlp:
        inner = np.maximum(up, 0)
    elif cfg.clamped_gate is not None:
        alpha, limit = cfg.clamped_gate.alpha, cfg.clamped_gate.limit
        gate, up = np.minimum(linear('gate', x), limit), np.clip(up, -limit, limit)
        inner = (up + 1) * gate / (1 + np.exp(-alpha * gate))
    else:
        gate = linear('gate', x)
        inner = gate / (1 + np.exp(-gate)) * up
    return linear('down', inner)


def by_hand(cfg, params, x):
    """[B, T, D], the load of each expert and the rows dropped: token after token; padding goes to no expert."""
    experts, router = cfg.experts, params['router']
    chosen = {}
    for b, t in np.ndindex(B, T):
        logits = router['kernel'] @ x[b, t] + router.get('bias', 0)
        scores = np.exp(logits) / np.exp(logits).sum() if experts.scoring == 'softmax' else 1 / (1 + np.exp(-logits))
        ranked = scores + router.get('correction', 0)
        best = np.sort(ranked.reshape(experts.groups, -1), axis=1)[:, -2:].sum(axis=1)
        groups = np.argsort(-best)[: experts.top_groups]
        ranked[~np.isin(np.arange(experts.count) * experts.groups // experts.count, groups)] = -np.inf
        ids = np.argsort(-ranked)[: experts.per_token]
        chosen[b, t] = ids, scores[ids] * experts.scale / (scores[ids].sum() if experts.normalized else 1)
    room = B * T * experts.per_token * (experts.capacity or math.inf) / experts.count
    out, load, taken, dropped = np.zeros_like(x), np.zeros(experts.count), np.zeros(experts.count), 0
    for j in range(experts.per_token):
        for (b, t), (ids, weights) in chosen.items():
            if not REAL[b, t]:
                continue
            load[ids[j]] += 1
            if taken[ids[j]] >= room:
                dropped += 1
                continue
            taken[ids[j]] += 1
            read, weigh = (weights[j] * x[b, t], 1) if experts.on_input else (x[b, t], weights[j])
            out[b, t] += weigh * unit(cfg, params['experts'], ids[j], read)
    if experts.shared_width:
        for b, t in np.ndindex(B, T):
            out[b, t] += unit(cfg, params['shared'], (), x[b, t])
    return out, load, dropped


@pytest.mark.parametrize('name', MODELS)
def test_the_mixture_is_a_loop_over_tokens(name, double_precision):
    cfg, x = MODELS[name], random_input()
    params = random_params(cfg)
    out, sums = jax.jit(MoE(cfg).apply)({'params': params}, x, SEGMENTS)
    wanted, load, dropped = by_hand(cfg, params, x)
    np.testing.assert_allclose(out, wanted, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(sums.load, load)
    assert float(sums.dropped) == dropped
    assert (dropped > 0) == (name == 'capacity')
    assert float(sums.late) == 0
    if cfg.experts.shared_width:
        assert np.all(np.any(np.asarray(out)[~REAL] != 0, axis=-1))
    else:
        assert not np.asarray(out)[~REAL].any()


def test_padding_changes_nothing_but_itself(double_precision):
    """Capacity, loads and auxiliary sums too: garbage in the padding takes nobody's room."""
    cfg, x = MODELS['capacity'], random_input()
    other = x.copy()
    other[~REAL] = 100 * np.random.default_rng(5).normal(size=other[~REAL].shape)
    run = jax.jit(MoE(cfg).apply)
    one, two = (run({'params': random_params(cfg)}, given, SEGMENTS) for given in (x, other))
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(left, right)


def test_a_correction_has_no_gradient_and_the_router_has_one(double_precision):
    cfg, x = MODELS['shared-corrected'], random_input()
    params = random_params(cfg)
    direction = jax.tree.map(np.random.default_rng(6).normal, jax.tree.map(np.zeros_like, params))
    direction['router']['correction'] = np.zeros(6)

    @jax.jit
    def loss(params):
        out, sums = MoE(cfg).apply({'params': params}, x, SEGMENTS)
        return jnp.sum(jnp.square(out)) + sums.z

    gradient = jax.jit(jax.grad(loss))(params)
    assert not np.any(gradient['router']['correction'])
    along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: float(np.sum(g * d)), gradient, direction)))
    above, below = (
        float(loss(jax.tree.map(lambda p, d, s=step: p + s * d, params, direction))) for step in (1e-6, -1e-6)
    )
    assert along == pytest.approx((above - below) / 2e-6, rel=1e-6)


def test_in_bfloat16_the_router_decides_in_float32():
    """Logits, scores and sums are float32, from a float32 product of the router's own weights."""
    cfg = MODELS['plain']
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), random_params(cfg))
    x = jnp.asarray(random_input(), jnp.bfloat16)
    (out, sums), state = jax.jit(
        lambda p, x: MoE(cfg).apply({'params': p}, x, SEGMENTS, capture_intermediates=True, mutable='intermediates')
    )(params, x)
    logits = state['intermediates']['router']['__call__'][0][0]
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {np.dtype('float32')}
    assert logits.dtype == jnp.float32
    exact = np.einsum('btd,ed->bte', np.asarray(x, np.float64), params['router']['kernel'].astype(np.float64))
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-5)
    wanted, load, _ = by_hand(cfg, params, np.asarray(x, np.float64))
    np.testing.assert_array_equal(sums.load, load)
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, rtol=0.03, atol=0.03 * np.abs(wanted).max())


def names(jaxpr):
    """What is named in a program, inner programs included."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == 'name':
            found.append(eqn.params['name'])
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')):
            inner = getattr(inner, 'jaxpr', inner)
            found += names(inner) if hasattr(inner, 'eqns') else []
    return found


def test_products_of_the_router_keep_all_bits_of_float32():
    """Its own and those of both gradients; by default a GPU would round what they read to 10 bits."""
    router, params = Router(Experts(5, 2, F)), {'params': {'kernel': jnp.ones((5, D))}}

    def total(params, x):
        return jnp.sum(jnp.square(router.apply(params, x)[0]))

    lowered = jax.jit(jax.grad(total, (0, 1))).lower(params, jnp.ones((B * T, D))).as_text()
    products = [line for line in lowered.splitlines() if 'dot_general' in line]
    assert len(products) == 3
    assert all('precision = [HIGHEST, HIGHEST]' in line for line in products), products


@pytest.mark.parametrize('name', ['plain', 'no-gate-on-input'])
def test_remat_changes_no_gradient(name, double_precision):
    cfg, x = MODELS[name], random_input()
    params = random_params(cfg)

    def gradient(params, x, policy):
        def apply(params, x):
            out, sums = MoE(cfg).apply({'params': params}, x, SEGMENTS)
            return jnp.sum(jnp.square(out)) + sums.balance + sums.z

        if policy is not None:
            apply = jax.checkpoint(apply, policy=remat_policy(policy))
        return jax.grad(apply, (0, 1))(params, x)

    policies = (None, 'full', 'dots', 'save:mlp_up,mlp_gate')
    plain, *others = jax.jit(lambda p, x: [gradient(p, x, policy) for policy in policies])(params, x)
    for other in others:
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11 * float(np.max(np.abs(a))))


def products(policy):
    """Grouped products of forward passes in a gradient: forward, and made again for the backward pass."""
    cfg = MODELS['plain']

    def apply(params, x):
        return jnp.sum(MoE(cfg).apply({'params': params}, x, SEGMENTS)[0])

    if policy is not None:
        apply = jax.checkpoint(apply, policy=remat_policy(policy))
    program = jax.make_jaxpr(jax.grad(apply, (0, 1)))(random_params(cfg), random_input())
    return names(program.jaxpr).count(PRODUCT)


def test_remat_dots_makes_no_grouped_product_twice():
    assert [products(policy) for policy in (None, 'dots', 'full')] == [3, 3, 6]


def test_gathered_kernels_of_experts_are_not_kept_for_the_backward_pass():
    """On a mesh that divides D over fsdp: what is kept are the parts, and the layer's input."""
    cfg = MODELS['plain']
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    params = {'mlp': random_params(cfg)}
    specs = jax.tree.map(lambda leaf: P(), params)
    specs['mlp']['experts'] = {
        'up': {'kernel': P(None, None, 'fsdp')},
        'gate': {'kernel': P(None, None, 'fsdp')},
        'down': {'kernel': P(None, 'fsdp')},
    }
    shapes = []

    def body(params, x):
        def apply(params, x):
            return MoE(cfg).apply({'params': gather(params, 'float32')['mlp']}, x, jnp.asarray(SEGMENTS))[0]

        pull = jax.vjp(jax.checkpoint(apply, policy=keep_activations(params)), params, x)[1]
        shapes.extend(leaf.shape for leaf in jax.tree.leaves(pull))
        return x

    mapped = jax.shard_map(body, mesh=mesh, in_specs=(specs, P()), out_specs=P(), check_vma=False)
    jax.eval_shape(mapped, params, random_input())
    whole = {(5, F, D), (5, D, F)}
    assert shapes.count((5, F, D // 2)) == 2  # the parts themselves
    assert not whole & set(shapes)
    assert (B, T, D) in shapes
