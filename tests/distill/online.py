"""One step against a teacher's likeliest words, written plainly: what jobs must give that get these words elsewhere."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import recorded

import jpt
from jpt.data.tokenizer import Tokenizer
from jpt.models.config import Compute
from jpt.models.transformer import forward, unembed
from jpt.training.job import first_state, make_job
from jpt.training.loop import open_feed

TEMPERATURE = 1.5


def first_batch(job):
    with contextlib.closing(open_feed(job, job.config.data, Tokenizer.load(recorded.TOKENIZER))) as feed:
        return next(feed)


@functools.cache
def online(folder, alpha=0.7, words=8):
    """(loss, gradients) of the same step against the teacher's own likeliest words, written plainly, in one program."""
    teacher = jpt.load(folder / 'teacher')
    distill = {'temperature': TEMPERATURE}
    job = make_job(recorded.settings(folder, distill=distill), jax.devices()[:1])
    batch, params = first_batch(job), first_state(job).params
    places = batch.tokens, batch.positions, batch.segment_ids

    def logp(cfg, params, temperature):
        hidden = forward(cfg, params, *places, compute=Compute('float32')).hidden_BTD
        return jax.nn.log_softmax(unembed(cfg, params, hidden)[..., : cfg.vocab_size] / temperature)

    def loss(params):
        p, student = logp(teacher.config, teacher.params, TEMPERATURE), job.models['model'].cfg
        q, plain = logp(student, params, TEMPERATURE), logp(student, params, 1.0)
        top, ids = jax.lax.top_k(p, words)
        kept = jax.nn.one_hot(ids, p.shape[-1], dtype=bool).any(axis=-2)
        tail_p, tail_q = (jax.nn.logsumexp(jnp.where(kept, -jnp.inf, x), axis=-1) for x in (p, q))
        kl = jnp.sum(jnp.exp(top) * (top - jnp.take_along_axis(q, ids, -1)), -1) + jnp.exp(tail_p) * (tail_p - tail_q)
        ce = -jnp.take_along_axis(plain, batch.targets[..., None], -1)[..., 0]
        mask = batch.loss_mask
        return jnp.sum(mask * (alpha * TEMPERATURE**2 * kl + (1 - alpha) * ce)) / jnp.sum(mask)

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(params))


def distance(ours, theirs):
    """Relative, by the norm of the whole gradient."""
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    apart = sum(float(np.sum((np.asarray(a, np.float64) - b) ** 2)) for a, b in pairs)
    return (apart / sum(float(np.sum(np.asarray(b, np.float64) ** 2)) for _, b in pairs)) ** 0.5
