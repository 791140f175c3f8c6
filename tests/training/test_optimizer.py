"""Optimizers against optax, float64 numpy and literal tables of what each leaf gets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jpt.config import ConfigError
from jpt.models.config import LayerKind, ModelConfig, Rope, Segment
from jpt.models.transformer import init as init_model
from jpt.quant.dot import LoraKernel
from jpt.quant.paths import map_with_path, paths
from jpt.sharding.rules import state_specs
from jpt.training import low_bit
from jpt.training.optimizer import OptimizerConfig, global_norm, make_optimizer, plan_of
from jpt.training.schedule import ScheduleConfig, make_schedule

SCHEDULE = make_schedule(ScheduleConfig('cosine', lr=0.01, warmup=2), steps=10)

# Role, rule under name='muon', and decay, of every leaf of a model with everything that the families have.
EXPECTED = {
    'embed/embedding': ('embedding', 'adamw', 0.0),
    'positions/embedding': ('embedding', 'adamw', 0.0),
    'layers/0.0/attn/q/kernel/base': ('kernel', 'muon', 0.1),
    'layers/0.0/attn/q/kernel/a': ('lora', 'adamw', 0.1),
    'layers/0.0/attn/q/kernel/b': ('lora', 'adamw', 0.1),
    'layers/0.0/attn/q/bias': ('bias', 'adamw', 0.0),
    'layers/0.0/attn/k/kernel': ('kernel', 'muon', 0.1),
    'layers/0.0/attn/k/bias': ('bias', 'adamw', 0.0),
    'layers/0.0/attn/v/kernel': ('kernel', 'muon', 0.1),
    'layers/0.0/attn/v/bias': ('bias', 'adamw', 0.0),
    'layers/0.0/attn/out/kernel': ('kernel', 'muon', 0.1),
    'layers/0.0/attn/out/bias': ('bias', 'adamw', 0.0),
    'layers/0.0/attn/q_norm/scale': ('norm', 'adamw', 0.0),
    'layers/0.0/attn/k_norm/scale': ('norm', 'adamw', 0.0),
    'layers/0.0/attn_norm/scale': ('norm', 'adamw', 0.0),
    'layers/0.0/attn_norm/bias': ('bias', 'adamw', 0.0),
    'layers/0.0/attn_post_norm/scale': ('norm', 'adamw', 0.0),
    'layers/0.0/attn_post_norm/bias': ('bias', 'adamw', 0.0),
    'layers/0.0/mlp_norm/scale': ('norm', 'adamw', 0.0),
    'layers/0.0/mlp_norm/bias': ('bias', 'adamw', 0.0),
    'layers/0.0/mlp_post_norm/scale': ('norm', 'adamw', 0.0),
    'layers/0.0/mlp_post_norm/bias': ('bias', 'adamw', 0.0),
    'layers/0.0/mlp/gate/kernel': ('kernel', 'muon', 0.1),
    'layers/0.0/mlp/gate/bias': ('bias', 'adamw', 0.0),
    'layers/0.0/mlp/up/kernel': ('kernel', 'muon', 0.1),
    'layers/0.0/mlp/up/bias': ('bias', 'adamw', 0.0),
    'layers/0.0/mlp/down/kernel': ('kernel', 'muon', 0.1),
    'layers/0.0/mlp/down/bias': ('bias', 'adamw', 0.0),
    'final_norm/scale': ('norm', 'adamw', 0.0),
    'final_norm/bias': ('bias', 'adamw', 0.0),
    'lm_head/kernel': ('head', 'adamw', 0.1),
    'projections/pair/to_teacher/kernel': ('kernel', 'muon', 0.1),
}


def _tree(rng: np.random.Generator) -> dict:
    def leaf(*shape):
        return rng.normal(size=shape).astype(np.float32)

    layer = {'q': {'kernel': leaf(2, 32, 128), 'bias': leaf(2, 32)}, 'attn_norm': {'scale': leaf(2, 128)}}
    return {
        'embed': {'embedding': leaf(64, 128)},
        'layers': [[layer]],
        'lm_head': {'kernel': leaf(64, 128)},
        'frozen': {'kernel': None},
    }


def _zeros(init, params):
    """The state that `init` makes, without compiling it: it is all zeros."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(init, params))


@functools.cache
def _program(config: OptimizerConfig):
    """One compiled update per config, shared by the tests."""
    return jax.jit(make_optimizer(config, SCHEDULE).update)


def _run(config: OptimizerConfig, steps: int, scale: float = 1.0):
    """Some updates with a fixed sequence of gradients: params, state, metrics, gradients."""
    optimizer = make_optimizer(config, SCHEDULE)
    params = _tree(np.random.default_rng(0))
    gradients = [
        jax.tree.map(lambda x: np.float32(scale) * x, _tree(np.random.default_rng(10 + n))) for n in range(steps)
    ]
    state, update = _zeros(optimizer.init, params), _program(config)
    for gradient in gradients:
        params, state, metrics = update(gradient, state, params, True)
    return params, state, metrics, gradients


def test_every_leaf_of_a_real_tree_gets_what_the_table_says():
    kind = LayerKind(rope=Rope(), mlp_width=16)
    cfg = ModelConfig(
        *('llama', 32, 8, 2, 1, 4, (Segment((kind,), 3),), 64),
        **dict.fromkeys(['qkv_bias', 'qk_norm', 'post_norms', 'mlp_bias', 'attention_out_bias'], True),
        learned_positions=True,
        norm='layer',
    )
    params = jax.eval_shape(lambda: init_model(cfg, jax.random.key(0)))
    query = params['layers'][0][0]['attn']['q']
    factor = jax.ShapeDtypeStruct((3, 2, 8), jnp.float32)
    query['kernel'] = LoraKernel(query['kernel'], factor, factor, 1.0)
    params['projections'] = {'pair': {'to_teacher': {'kernel': jax.ShapeDtypeStruct((6, 8), jnp.float32)}}}
    found = {path: tuple(plan_of(path, OptimizerConfig('muon'))) for path in paths(params)}
    assert found == EXPECTED
    plain = {path: plan_of(path, OptimizerConfig('adamw', decay_embeddings=True)) for path in paths(params)}
    assert {plan.rule for plan in plain.values()} == {'adamw'}
    decayed = {path for path, plan in plain.items() if plan.decay}
    assert decayed == {path for path, (_, _, decay) in EXPECTED.items() if decay} | {
        'embed/embedding',
        'positions/embedding',
    }


def test_an_unknown_leaf_is_refused_by_name():
    with pytest.raises(ValueError, match=r"no role for the parameter 'layers/0\.0/ssm/decay_rate'"):
        plan_of('layers/0.0/ssm/decay_rate', OptimizerConfig())


@functools.cache
def _optax_program():
    mask = {
        'embed': {'embedding': False},
        'layers': [[{'q': {'kernel': True, 'bias': False}, 'attn_norm': {'scale': False}}]],
        'lm_head': {'kernel': True},
        'frozen': {'kernel': None},
    }
    adamw = optax.adamw(SCHEDULE, 0.8, 0.9, 1e-6, weight_decay=0.3, mask=mask)
    tx = optax.chain(optax.clip_by_global_norm(2.0), adamw)

    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return tx, step


@pytest.mark.parametrize('scale', [1.0, 1e-3])
def test_adamw_is_that_of_optax(scale):
    """With gradients that are clipped and with such that are not."""
    config = OptimizerConfig(b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3, clip_norm=2.0)
    params, _, metrics, gradients = _run(config, 4, scale)
    expected = _tree(np.random.default_rng(0))
    tx, optax_step = _optax_program()
    state = _zeros(tx.init, expected)
    for gradient in gradients:
        expected, state = optax_step(expected, state, gradient)
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
    assert params['frozen']['kernel'] is None
    flat = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(gradients[-1])])
    assert float(metrics['grad_norm']) == pytest.approx(np.sqrt(np.square(flat).sum()), rel=1e-6)
    assert float(metrics['lr']) == pytest.approx(0.01 * (1 + np.cos(np.pi / 8)) / 2, rel=1e-6)


@pytest.mark.parametrize(('nesterov', 'scale'), [(True, 'rms'), (False, 'spectral')])
def test_muon_is_that_of_float64_numpy(nesterov, scale):
    config = OptimizerConfig(
        'muon',
        weight_decay=0.2,
        clip_norm=None,
        muon_nesterov=nesterov,
        muon_scale=scale,
        muon_lr_multiplier=3.0,
        muon_momentum=0.9,
    )
    params, state, _, gradients = _run(config, 2)
    kernel = np.asarray(_tree(np.random.default_rng(0))['layers'][0][0]['q']['kernel'], np.float64)
    momentum = np.zeros_like(kernel)
    for n, gradient in enumerate(gradients):
        step = np.asarray(gradient['layers'][0][0]['q']['kernel'], np.float64)
        momentum = 0.9 * momentum + step
        left, values, right = np.linalg.svd(step + 0.9 * momentum if nesterov else momentum, full_matrices=False)
        values = values / np.sqrt(np.square(values).sum(-1, keepdims=True))
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        factor = 0.2 * np.sqrt(128) if scale == 'rms' else 1.0
        kernel -= 3.0 * 0.01 * (n + 1) / 3 * (factor * (left * values[:, None]) @ right + 0.2 * kernel)
    np.testing.assert_allclose(params['layers'][0][0]['q']['kernel'], kernel, atol=1e-5)
    assert state.nu['layers'][0][0]['q']['kernel'] is None
    assert state.nu['layers'][0][0]['q']['bias'] is not None


def test_sgd_with_momentum_is_its_recurrence():
    params, state, _, gradients = _run(OptimizerConfig('sgd', b1=0.5, weight_decay=0.0, clip_norm=None), 3)
    bias = np.asarray(_tree(np.random.default_rng(0))['layers'][0][0]['q']['bias'])
    momentum = np.zeros_like(bias)
    for lr, gradient in zip([0.01 / 3, 0.02 / 3, 0.01], gradients, strict=True):
        momentum = 0.5 * momentum + np.asarray(gradient['layers'][0][0]['q']['bias'])
        bias = bias - lr * momentum
    np.testing.assert_allclose(params['layers'][0][0]['q']['bias'], bias, rtol=1e-5)
    assert jax.tree.leaves(state.nu) == []


@pytest.mark.parametrize('moments', ['bfloat16', 'int8'])
def test_moments_in_fewer_bits_stay_near_those_in_float32(moments):
    exact, _, _, _ = _run(OptimizerConfig(), 6)
    params, state, _, _ = _run(OptimizerConfig(moments=moments), 6)
    start = _tree(np.random.default_rng(0))
    for name, leaf in (('embed', 'embedding'), ('lm_head', 'kernel')):
        moved = np.asarray(exact[name][leaf]) - start[name][leaf]
        error = np.asarray(params[name][leaf]) - np.asarray(exact[name][leaf])
        assert np.linalg.norm(error) < 0.06 * np.linalg.norm(moved)
        assert isinstance(state.mu[name][leaf], low_bit.Blocks8) == (moments == 'int8')
    assert state.mu['layers'][0][0]['attn_norm']['scale'].dtype == jnp.float32
    np.testing.assert_allclose(
        params['layers'][0][0]['q']['bias'], exact['layers'][0][0]['q']['bias'], rtol=1e-6, atol=1e-7
    )


def test_a_refused_step_changes_no_bit():
    config = OptimizerConfig('muon', moments='int8')
    params, state, _, gradients = _run(config, 1)
    update = _program(config)
    broken = jax.tree.map(np.copy, gradients[0])
    broken['embed']['embedding'][3, 5] = np.nan
    for gradient, accept in ((broken, True), (gradients[0], False)):
        same = update(gradient, state, params, accept)
        assert not same[2]['accepted']
        for got, want in zip(jax.tree.leaves(same[:2]), jax.tree.leaves((params, state)), strict=True):
            np.testing.assert_array_equal(got, want)
    assert int(update(gradients[0], state, params, True)[1].updates) == 2


def test_bfloat16_params_move_though_each_step_is_below_their_precision():
    schedule = make_schedule(ScheduleConfig('constant', lr=1e-4), steps=100)
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.0, clip_norm=None), schedule)
    params = gradients = {'kernel': np.ones((64, 64), jnp.bfloat16)}

    def step(carry, _):
        return optimizer.update(gradients, carry[1], carry[0])[:2], None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=50))(
        (params, _zeros(optimizer.init, params))
    )
    assert params['kernel'].dtype == jnp.bfloat16
    assert np.asarray(params['kernel'], np.float32).mean() == pytest.approx(1 - 50 * 1e-4, abs=5e-4)


def test_state_is_sharded_as_the_params_and_the_update_does_not_depend_on_it():
    config = OptimizerConfig('muon', moments='int8')
    optimizer = make_optimizer(config, SCHEDULE)
    params, gradients = _tree(np.random.default_rng(0)), _tree(np.random.default_rng(10))
    expected, _, _, _ = _run(config, 1)
    layer = {'q': {'kernel': P(None, 'y', 'x'), 'bias': P(None, None)}, 'attn_norm': {'scale': P(None, 'x')}}
    specs = {
        'embed': {'embedding': P('y', 'x')},
        'layers': [[layer]],
        'lm_head': {'kernel': P(('x', 'y'), None)},
        'frozen': {'kernel': None},
    }
    mesh = jax.make_mesh((2, 4), ('x', 'y'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = state_specs(jax.eval_shape(optimizer.init, params), params, specs, mesh.shape)
    # 128 columns are one block: it does not divide over x=2, so the scales are replicated along it.
    assert placed.mu['embed']['embedding'].codes == P('y', 'x')
    assert placed.mu['embed']['embedding'].scale == P('y', None)
    assert placed.mu['lm_head']['kernel'].scale == P(('x', 'y'), None)
    assert placed.mu['layers'][0][0]['attn_norm']['scale'] == P(None, 'x')
    assert placed.nu['layers'][0][0]['q']['kernel'] is None
    assert placed.updates == P()

    def shardings(tree):
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), tree, is_leaf=lambda leaf: isinstance(leaf, P))

    put = jax.device_put((params, gradients), shardings((specs, specs)))
    state = jax.device_put(_zeros(optimizer.init, params), shardings(placed))
    moved, state, _ = _program(config)(put[1], state, put[0], True)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-6), moved, expected)


def test_moments_are_of_at_least_float32_and_have_the_structure_of_the_params():
    optimizer = make_optimizer(OptimizerConfig(), SCHEDULE)
    with jax.enable_x64(True):
        params = {'kernel': jax.ShapeDtypeStruct((4, 4), jnp.float64), 'bias': None}
        state = jax.eval_shape(optimizer.init, params)
        moved, _, metrics = jax.eval_shape(optimizer.update, params, state, params)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.mu, state.nu, moved))} == {jnp.dtype('float64')}
    assert metrics['grad_norm'].dtype == jnp.float64
    assert map_with_path(lambda path, _: path, state.mu) == {'kernel': 'kernel', 'bias': None}
    half = jax.eval_shape(optimizer.init, {'kernel': jax.ShapeDtypeStruct((4, 4), jnp.bfloat16)})
    assert half.mu['kernel'].dtype == half.nu['kernel'].dtype == jnp.float32


def test_global_norm_counts_bfloat16_exactly():
    tree = {'a': np.full((4096,), 1.0078125, jnp.bfloat16), 'b': np.zeros((), np.float32)}
    assert float(jax.jit(global_norm)(tree)) == pytest.approx(64 * 1.0078125, rel=1e-6)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'b1': 1.0}, r'OptimizerConfig\.b1=1\.0: expected a number in \[0, 1\)'),
        ({'eps': 0.0}, r'eps=0\.0: expected a positive number'),
        ({'weight_decay': -0.1}, 'weight_decay=-0.1: expected a number of 0 or more'),
        ({'clip_norm': 0.0}, 'clip_norm=0.0: expected a positive number or None'),
        ({'muon_steps': 0}, 'muon_steps=0: expected a positive integer'),
        ({'muon_lr_multiplier': 0.0}, 'muon_lr_multiplier=0.0: expected a positive number'),
    ],
)
def test_values_are_checked(values, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**values)
