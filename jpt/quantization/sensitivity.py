"""What a format in place of a group of weights would cost a model: by gradients, or by trying it.

Both are in nats per token, of the divergence KL(original || model with this group alone quantized).

By gradients it is half of E sum (g (y' - y))^2 over all tokens and outputs of a layer, where g is the gradient of the
log-likelihood by the output y, and y' the output with the format: the divergence to second order, whose curvature is
the Fisher matrix, of which the diagonal is taken. (ModelOpt's auto_quantize has the same sum of squares with the
gradient of a loss by the texts' own words; here the words are drawn from the model, as the Fisher matrix has it.) It
takes a forward and a backward pass per format.

By trying, it takes a forward pass per format, group and layer, and is the divergence itself.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpt.data.batch import Batch
from jpt.evaluation.score import Reference, score
from jpt.model import Model
from jpt.models.config import Compute, ModelConfig
from jpt.models.transformer import forward, unembed
from jpt.quant.dot import is_weight
from jpt.quant.paths import map_with_path
from jpt.quant.tensors import QTensor
from jpt.quant.tried import Tried
from jpt.quantization.inputs import groups_of, place_of

CHUNK = 256  # tokens whose logits are in memory at a time


class Group(NamedTuple):
    """Weights of one layer that read the same input, and so have one format."""

    layer: int  # number in the network
    name: str  # 'attn/{q,k,v}' or 'mlp/down': a pattern of what they are called in the layer
    paths: tuple[str, ...]  # of the stacks that hold the weights
    repeat: int  # place in the stacks


def groups_by_layer(cfg: ModelConfig, paths: Mapping[str, Any]) -> list[Group]:
    """The groups of these weights, layer by layer."""
    found = []
    for members in groups_of(paths).values():
        segment, kind, (*module, _) = place_of(members[0])
        own = '/'.join((*module, either([place_of(path)[2][-1] for path in members])))
        for repeat in range(cfg.segments[segment].repeats):
            found.append(Group(cfg.layer_index(segment, kind, repeat), own, tuple(members), repeat))
    return sorted(found, key=lambda group: group.layer)


def either(words: Sequence[Any]) -> str:
    """A pattern that is any of the words, see jpt.quant.paths."""
    return str(words[0]) if len(words) == 1 else f'{{{",".join(map(str, words))}}}'


def with_tried(params: Any, tensors: Mapping[str, QTensor]) -> Any:
    """The parameters with quantized forms beside the weights, by path."""

    def one(path: str, leaf: Any) -> Any:
        if path not in tensors:
            return leaf
        repeats = leaf.shape[:1]
        return Tried(leaf, tensors[path], np.zeros(repeats, bool), np.zeros(repeats, np.float32), leaf.shape[-1])

    return map_with_path(one, params, is_leaf=is_weight)


def by_gradient(
    model: Model, tensors: Mapping[str, QTensor], batches: Sequence[Batch], seed: int = 0
) -> dict[str, np.ndarray]:
    """The sensitivity [R] of every weight, nats per token, by its path; those of a group add up."""
    params = with_tried(model.params, tensors)
    compute = dataclasses.replace(model.compute, remat='full')
    scores = {path: np.zeros(tensor.shape[:1], np.float32) for path, tensor in tensors.items()}
    found = {path: np.zeros(values.shape) for path, values in scores.items()}
    tokens = 0.0
    for at, batch in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(seed), at)
        one = _score_gradient(model.config, params, scores, batch, key, compute)
        found = {path: values + np.asarray(one[path], np.float64) for path, values in found.items()}
        tokens += float(np.sum(batch.loss_mask > 0))
    return {path: values / (2 * tokens) for path, values in found.items()}


@partial(jax.jit, static_argnums=(0, 5))
def _score_gradient(
    cfg: ModelConfig, params: Any, scores: Any, batch: Batch, key: jax.Array, compute: Compute
) -> dict[str, jax.Array]:
    return jax.grad(lambda scores: _surprise(cfg, _with(params, scores=scores), batch, key, compute))(scores)


def _with(params: Any, **changes: Mapping[str, Any]) -> Any:
    """The tree with other fields of its tried weights, by path."""

    def one(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tried):
            return leaf
        return dataclasses.replace(leaf, **{name.removesuffix('s'): values[path] for name, values in changes.items()})

    return map_with_path(one, params, is_leaf=is_weight)


def _surprise(cfg: ModelConfig, params: Any, batch: Batch, key: jax.Array, compute: Compute) -> jax.Array:
    """-log p of a word per predicted token, drawn from the model itself; summed."""
    hidden_BTD = forward(cfg, params, batch.tokens, batch.positions, batch.segment_ids, compute=compute).hidden_BTD
    rows = -batch.tokens.size % CHUNK
    hidden_MD = jnp.pad(hidden_BTD.reshape(-1, cfg.width), ((0, rows), (0, 0)))
    counts_M = jnp.pad((batch.loss_mask > 0).reshape(-1), (0, rows))
    keys = jax.random.split(key, len(counts_M) // CHUNK)

    @jax.checkpoint
    def of_chunk(parts: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        hidden_CD, counts_C, key = parts
        log_p_CV = jax.nn.log_softmax(unembed(cfg, params, hidden_CD), axis=-1)
        words_C = jax.random.categorical(key, jax.lax.stop_gradient(log_p_CV))
        return -jnp.sum(jnp.where(counts_C, jnp.take_along_axis(log_p_CV, words_C[:, None], axis=-1)[:, 0], 0))

    parts = hidden_MD.reshape(-1, CHUNK, cfg.width), counts_M.reshape(-1, CHUNK), keys
    return jnp.sum(jax.lax.map(of_chunk, parts))


def by_kl(
    model: Model,
    tensors: Mapping[str, QTensor],
    groups: Sequence[Group],
    batches: Sequence[Batch],
    say: Callable[[str], Any] = lambda line: None,
) -> list[float]:
    """The divergence of the model with each group alone quantized, nats per token."""
    params = with_tried(model.params, tensors)
    found = []
    for at, group in enumerate(groups):
        on = {path: np.zeros(tensor.shape[:1], bool) for path, tensor in tensors.items()}
        for path in group.paths:
            on[path][group.repeat] = True
        found.append(_divergence(model, _with(params, on=on), batches))
        say(f'{at + 1} of {len(groups)} groups tried')
    return found


def _divergence(model: Model, params: Any, batches: Sequence[Batch]) -> float:
    """KL(model || model with these parameters) per predicted token."""
    total = count = 0.0
    reference = Reference(model.config, model.params)
    for batch in batches:
        scores = score(model.config, params, batch, reference=reference, compute=model.compute)
        total += float(np.sum(np.asarray(scores.kl, np.float64) * batch.loss_mask))
        count += float(np.sum(batch.loss_mask))
    return total / count
