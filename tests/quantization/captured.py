"""A small Llama whose inputs have channels far larger than others, and what its linear layers read, in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jpt.data.batch import Batch, empty_batch
from jpt.model import Model
from jpt.models.config import LayerKind, ModelConfig, Segment
from jpt.models.transformer import init

CFG = ModelConfig(
    family='llama',
    vocab_size=31,
    width=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    segments=(Segment((LayerKind(mlp_width=24),), 3),),
    max_length=32,
)
GROUPS = {'attn/q': ('attn/q', 'attn/k', 'attn/v'), 'attn/out': ('attn/out',)} | {
    'mlp/up': ('mlp/up', 'mlp/gate'),
    'mlp/down': ('mlp/down',),
}
LOUD = (2, 7)  # channels of every norm's output that are 40 times as large as the others


@functools.cache
def small_model() -> Model:
    """The model, of random weights, and of norms with loud channels."""
    keys = iter(jax.random.split(jax.random.key(3), 64))
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), init(CFG, jax.random.key(0)))
    for name in ('attn_norm', 'mlp_norm'):
        layer = params['layers'][0][0]
        layer[name]['scale'] = jnp.abs(layer[name]['scale']).at[:, LOUD].multiply(40)
    return Model(CFG, params)


def path_of(name: str) -> str:
    """The weight's path in the tree."""
    return f'layers/0.0/{name}/kernel'


def texts(rows: int) -> Batch:
    """Rows of a text and padding, of several lengths."""
    rng = np.random.default_rng(5)
    batch = empty_batch(rows, 12)
    for row in range(rows):
        end = int(rng.integers(6, 13))
        batch.tokens[row, :end] = rng.integers(0, 31, end)
        batch.positions[row, :end] = np.arange(end)
        batch.segment_ids[row, :end] = 1
        batch.loss_mask[row, : end - 1] = 1
    return batch


def divided(batch: Batch, rows: int) -> list[Batch]:
    """The batch as several of so many rows."""
    return [jax.tree.map(lambda x, at=at: x[at : at + rows], batch) for at in range(0, len(batch.tokens), rows)]


@functools.cache
def inputs(rows: int) -> list[dict[str, np.ndarray]]:
    """Of every layer what each group reads, [tokens, in] float64, over the real tokens of `texts(rows)`."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), small_model().params)
    batch = texts(rows)
    found = [{name: [] for name in GROUPS} for _ in range(CFG.num_layers)]

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + CFG.norm_eps) * scale

    for row in range(rows):
        h = p['embed']['embedding'][batch.tokens[row][batch.segment_ids[row] == 1]]
        for i in range(CFG.num_layers):
            w = jax.tree.map(lambda x, i=i: x[i], p['layers'][0][0])
            a, m, t = w['attn'], w['mlp'], len(h)
            x = norm(h, w['attn_norm']['scale'])
            found[i]['attn/q'].append(x)
            q, k, v = ((x @ a[n]['kernel'].T).reshape(t, heads, 4) for n, heads in (('q', 4), ('k', 2), ('v', 2)))
            out = []
            for head in range(4):
                scores = q[:, head] @ k[:, head // 2].T / 2 + np.triu(np.full((t, t), -np.inf), 1)
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                out.append(weights / weights.sum(-1, keepdims=True) @ v[:, head // 2])
            o = np.concatenate(out, -1)
            found[i]['attn/out'].append(o)
            h = h + o @ a['out']['kernel'].T
            x = norm(h, w['mlp_norm']['scale'])
            found[i]['mlp/up'].append(x)
            gate, up = x @ m['gate']['kernel'].T, x @ m['up']['kernel'].T
            inner = gate / (1 + np.exp(-gate)) * up
            found[i]['mlp/down'].append(inner)
            h = h + inner @ m['down']['kernel'].T
    return [{name: np.concatenate(parts) for name, parts in layer.items()} for layer in found]


def weight(name: str, layer: int) -> np.ndarray:
    """A weight [out, in], float32."""
    part, module = name.split('/')
    return np.asarray(small_model().params['layers'][0][0][part][module]['kernel'][layer])


def rounded(w: np.ndarray, largest: int, columns: int) -> np.ndarray:
    """A weight in integers up to `largest`, one scale for so many neighbours of a row; float64."""
    w = np.asarray(w, np.float32)
    found = np.zeros(w.shape)
    for start in range(0, w.shape[1], columns):
        block = w[:, start : start + columns]
        scale = (np.abs(block).max(1, keepdims=True) / np.float32(largest)).astype(np.float32)
        scale[scale == 0] = 1
        codes = np.clip(np.rint(block / scale), -largest, largest)
        found[:, start : start + columns] = codes.astype(np.float64) * scale
    return found
