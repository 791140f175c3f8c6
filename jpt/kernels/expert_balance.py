"""How evenly tokens are spread over experts: within each text, or over all tokens of a batch, wherever they lie.

Both are sum_e f_e P_e (DeepSeek-V3, equations 17 to 20), which is 1 where experts are used evenly: f_e is how many
choices went to an expert, in units of an even share, and P_e the mean of its score, where scores sum to 1. Only P has a
gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jpt.kernels.local import psum
from jpt.kernels.parallel_attention import ROWS, SEQUENCE


def text_balance(chosen_BTE, shares_BTE, segments_BT):
    """The balance of every text, times its tokens, summed over texts.

    A text is what has one segment id in a row, so neither packing, microbatches nor devices change the sum; where a row
    is divided over devices its parts are put together.

    Args:
      chosen_BTE: 1 where a token goes to an expert, 0 elsewhere and in padding (segment 0).
      shares_BTE: scores that sum to 1 over the experts of a token.
      segments_BT: int32.
    """
    # Texts are numbered from 1 in a row, so there are no more of them than tokens in the whole row.
    texts = segments_BT.shape[1] * psum(1, [SEQUENCE]) + 1

    def per_text(values_TE, segments_T):
        return jax.ops.segment_sum(values_TE, segments_T, texts)

    used_BXE = _in_even_shares(psum(jax.vmap(per_text)(chosen_BTE, segments_BT), [SEQUENCE]))
    mine_BTE = jnp.take_along_axis(used_BXE, segments_BT[..., None], axis=1, mode='clip')
    terms = lax.stop_gradient(mine_BTE) * shares_BTE
    return jnp.sum(jnp.where(segments_BT[..., None] > 0, terms, 0))


def batch_balance(load_LE, shares_LE):
    """The balance of all tokens together, times those here, summed over layers.

    Args:
      load_LE: how many tokens went to each expert of a layer, of all tokens; see `load_everywhere`.
      shares_LE: the sum of the experts' shares of the tokens here.
    """
    return jnp.sum(lax.stop_gradient(_in_even_shares(load_LE)) * shares_LE)


def load_everywhere(load_LE):
    """The load of the tokens of all devices, from that of the tokens here."""
    return psum(load_LE, (*ROWS, SEQUENCE))


def _in_even_shares(load):
    """A load [..., E] in units of its mean; zeros where there is none."""
    total = jnp.sum(load, axis=-1, keepdims=True)
    return load.shape[-1] * load / jnp.where(total > 0, total, 1)
