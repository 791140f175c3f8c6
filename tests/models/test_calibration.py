"""Statistics of a model over calibration data, against a transformer written plainly in numpy, and in any batching."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jpt
from jpt.data.batch import Batch, empty_batch
from jpt.models.calibration import calibrate
from jpt.models.config import LayerKind, ModelConfig, Segment
from jpt.models.layers import Linear
from jpt.models.transformer import forward, init
from jpt.quant.statistics import Watch

MODELS = pathlib.Path(__file__).parents[1] / 'golden' / 'models'
CFG = ModelConfig(
    family='llama',
    vocab_size=31,
    width=12,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    segments=(Segment((LayerKind(mlp_width=10),), 3),),
    max_length=32,
    qkv_bias=True,
)


def texts(rows: int) -> Batch:
    """Rows of two texts and padding, each of other lengths."""
    rng = np.random.default_rng(5)
    batch = empty_batch(rows, 9)
    for row in range(rows):
        start = 0
        for segment in (1, 2):
            end = start + int(rng.integers(2, 5))
            batch.tokens[row, start:end] = rng.integers(0, 31, end - start)
            batch.positions[row, start:end] = np.arange(end - start)
            batch.segment_ids[row, start:end] = segment
            start = end
    batch.tokens[batch.segment_ids == 0] = 30  # what stands in padding must not matter
    return batch


def parameters() -> dict:
    """Random ones in which no norm or bias is at its initial value."""
    keys = iter(jax.random.split(jax.random.key(3), 64))
    return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), init(CFG, jax.random.key(0)))


def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + CFG.norm_eps) * scale


def by_hand(params: dict, batch: Batch) -> tuple[int, list[dict[str, np.ndarray]]]:
    """(tokens, of each layer the sums), text by text in float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    sums = [{} for _ in range(CFG.num_layers)]

    def add(layer: int, name: str, value: np.ndarray) -> None:
        sums[layer][name] = sums[layer].get(name, 0) + value

    def read(layer: int, name: str, x: np.ndarray) -> None:
        add(layer, f'{name}/absolute', np.abs(x).sum(0))
        add(layer, f'{name}/square', (x**2).sum(0))

    for row in range(len(batch.tokens)):
        for segment in (1, 2):
            h = p['embed']['embedding'][batch.tokens[row][batch.segment_ids[row] == segment]]
            for i in range(CFG.num_layers):
                add(i, 'entering', (h**2 / (h**2).mean(-1, keepdims=True)).sum(0))
                w = jax.tree.map(lambda x, i=i: x[i], p['layers'][0][0])
                a, m, before, t = w['attn'], w['mlp'], h, len(h)
                x = norm(h, w['attn_norm']['scale'])
                read(i, 'attn/q', x)
                q, k, v = (
                    (x @ a[n]['kernel'].T + a[n]['bias']).reshape(t, heads, 4)
                    for n, heads in (('q', 4), ('k', 2), ('v', 2))
                )
                out = []
                for head in range(4):
                    scores = q[:, head] @ k[:, head // 2].T / 2 + np.triu(np.full((t, t), -np.inf), 1)
                    weights = np.exp(scores - scores.max(-1, keepdims=True))
                    out.append(weights / weights.sum(-1, keepdims=True) @ v[:, head // 2])
                o = np.concatenate(out, -1)
                read(i, 'attn/out', o)
                h = h + o @ a['out']['kernel'].T
                x = norm(h, w['mlp_norm']['scale'])
                read(i, 'mlp/up', x)
                gate, up = x @ m['gate']['kernel'].T, x @ m['up']['kernel'].T
                inner = gate / (1 + np.exp(-gate)) * up
                read(i, 'mlp/down', inner)
                h = h + inner @ m['down']['kernel'].T
                lengths = np.linalg.norm(before, axis=-1) * np.linalg.norm(h, axis=-1)
                add(i, 'cosine', ((before * h).sum(-1) / lengths).sum())
            add(-1, 'leaving', (h**2 / (h**2).mean(-1, keepdims=True)).sum(0))
    return int((batch.segment_ids > 0).sum()), sums


def flat(calibration) -> list[dict[str, np.ndarray]]:
    """Of each layer of CFG the sums, under the names of `by_hand`."""
    (tree,) = calibration.layers[0]
    found = {'cosine': tree['cosine'], 'entering': tree['entering']} | {
        f'{part}/{name}/{statistic}': values
        for part in ('attn', 'mlp')
        for name, module in tree[part].items()
        for statistic, values in module['input'].items()
    }
    return [{name: values[i] for name, values in found.items()} for i in range(CFG.num_layers)]


def test_sums_are_those_of_a_transformer_in_numpy():
    params, batch = parameters(), texts(4)
    found = calibrate(CFG, params, [batch])
    tokens, wanted = by_hand(params, batch)
    assert found.tokens == tokens
    np.testing.assert_allclose(found.leaving, wanted[-1].pop('leaving'), rtol=2e-5)
    for ours, theirs in zip(flat(found), wanted, strict=True):
        assert theirs.keys() < ours.keys()  # keys, values and gates read what others read
        for name, values in theirs.items():
            np.testing.assert_allclose(ours[name], values, rtol=2e-5, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(ours['attn/v/square'], ours['attn/q/square'])


def test_sums_do_not_depend_on_batches_or_on_the_mesh():
    params, batch = parameters(), texts(8)
    whole = calibrate(CFG, params, [batch])
    parts = [jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], batch) for i in range(4)]
    mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    divided = jax.device_put(batch, NamedSharding(mesh, P('data')))
    everywhere = jax.device_put(params, NamedSharding(mesh, P()))
    for other in (calibrate(CFG, params, parts), calibrate(CFG, everywhere, [divided])):
        assert other.tokens == whole.tokens
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), other, whole)


@pytest.mark.parametrize('name', ['nemotron_h_moe', 'deepseek_v3', 'gemma3_irregular'])
def test_layers_of_any_kind_are_compared_with_what_enters_them(name):
    """By the hidden states that taps return: several segments and kinds, state spaces, experts."""
    model = jpt.load(MODELS / name, mtp=False)
    cfg = model.config
    batch = texts(2)._replace(segment_ids=np.ones((2, 9), np.int32))
    batch = batch._replace(positions=np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9)))
    found = calibrate(cfg, model.params, [batch], ('square',))
    names = [f'layers.{n}.{end}' for n in range(cfg.num_layers) for end in ('input', 'output')]
    taps = forward(cfg, model.params, batch.tokens, taps=names).taps
    for segment, part in enumerate(cfg.segments):
        for kind in range(len(part.kinds)):
            for repeat in range(part.repeats):
                n = cfg.layer_index(segment, kind, repeat)
                x, y = (np.asarray(taps[f'layers.{n}.{end}'], np.float64) for end in ('input', 'output'))
                cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
                ours = found.layers[segment][kind]['cosine'][repeat]
                np.testing.assert_allclose(ours, cosine.sum(), rtol=1e-4)


def test_nothing_is_in_the_program_of_a_layer_that_is_not_watched():
    linear, x = Linear(3, parent=None), jnp.ones((1, 2, 4))
    params = {'params': linear.init(jax.random.key(0), x)['params']}
    assert linear.init(jax.random.key(0), x).keys() == {'params'}
    watched = params | {'watch': {'tokens': Watch(jnp.ones((1, 2)), ('absolute',))}}
    plain = jax.make_jaxpr(lambda x: linear.apply(params, x))(x)
    assert str(jax.make_jaxpr(lambda x: linear.apply(watched, x))(x)) == str(plain)
    measured = jax.make_jaxpr(lambda x: linear.apply(watched, x, mutable=['calibration']))(x)
    assert str(measured) != str(plain)


def test_padding_may_hold_anything_and_half_precision_is_summed_in_float32():
    x = jnp.full((1, 3, 2), 3.0, jnp.bfloat16).at[0, 2].set(jnp.nan)
    found = Watch(jnp.array([[1.0, 0.5, 0.0]]), ('absolute', 'square')).measure(x)
    assert found['square'].dtype == jnp.float32
    np.testing.assert_array_equal(found['absolute'], [4.5, 4.5])
    np.testing.assert_array_equal(found['square'], [13.5, 13.5])


def test_errors_name_what_was_given():
    params, batch = parameters(), texts(1)
    with pytest.raises(ValueError, match=r"statistics: 'amaxx': expected some of absolute, square"):
        calibrate(CFG, params, [batch], ('amaxx',))
    for nothing in ([], [empty_batch(1, 9)]):
        with pytest.raises(ValueError, match='no batch has a real token'):
            calibrate(CFG, params, nothing)
    with pytest.raises(ValueError, match=r'input of shape \(1, 3, 2\): expected \[B, T, in\] with'):
        Watch(jnp.ones((1, 2)), ('square',)).measure(jnp.ones((1, 3, 2)))
