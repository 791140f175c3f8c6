"""One layer, and which of its intermediate results the backward pass may keep."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from jpt.models.attention import Attention, Where
from jpt.models.cache import LayerCache
from jpt.models.config import Compute, LayerKind, ModelConfig
from jpt.models.latent_attention import LatentAttention
from jpt.models.layers import norm
from jpt.models.mlp import MLP
from jpt.models.moe import MoE
from jpt.models.routing import RouterSums

NAMES = ('query', 'key', 'value', 'attention', 'mlp_gate', 'mlp_up')


class Block(nn.Module):
    """A layer: attention, then MLP or experts, each added to the residual stream. [B, T, D] -> [B, T, D].

    Beside it the cache with what these tokens add, and the sums of the router where the layer has one.
    """

    cfg: ModelConfig
    kind: LayerKind
    compute: Compute

    @nn.compact
    def __call__(
        self, hidden_BTD: jax.Array, where: Where, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None, RouterSums | None]:
        cfg = self.cfg
        mixer = (Attention if cfg.latent is None else LatentAttention)(cfg, self.kind, self.compute, name='attn')
        mixed_BTD, cache = mixer(norm(cfg, 'attn_norm')(hidden_BTD) if cfg.pre_norms else hidden_BTD, where, cache)
        if cfg.post_norms:
            mixed_BTD = norm(cfg, 'attn_post_norm')(mixed_BTD)
        hidden_BTD = self.compute.place(hidden_BTD + mixed_BTD, ('batch', 'length', None))
        normed_BTD, sums = norm(cfg, 'mlp_norm')(hidden_BTD) if cfg.pre_norms else hidden_BTD, None
        if self.kind.experts:
            inner_BTD, sums = MoE(cfg, name='mlp')(normed_BTD, where.segments_BT)
        else:
            inner_BTD = MLP(cfg, self.kind.mlp_width, name='mlp')(normed_BTD)
        if cfg.post_norms:
            inner_BTD = norm(cfg, 'mlp_post_norm')(inner_BTD)
        return self.compute.place(hidden_BTD + inner_BTD, ('batch', 'length', None)), cache, sums


def apply_block(cfg: ModelConfig, kind: LayerKind, compute: Compute) -> Callable[..., Any]:
    """The layer as a function of (its params, hidden, where, cache), under the rematerialization asked for.

    Raises:
        ValueError: compute.remat is not a known policy, or names what no layer marks.
    """
    block = Block(cfg, kind, compute, parent=None)

    def apply(params: Any, hidden: jax.Array, where: Where, cache: LayerCache | None = None) -> Any:
        return block.apply({'params': params}, hidden, where, cache)

    if compute.remat == 'none':
        return apply
    return jax.checkpoint(apply, policy=remat_policy(compute.remat))


def remat_policy(remat: str) -> Callable[..., Any] | None:
    """The jax.checkpoint policy that a remat setting names ('full', 'dots', 'save:names', 'offload:names')."""
    policies = jax.checkpoint_policies
    verb, _, listed = remat.partition(':')
    names = [name for name in listed.split(',') if name]
    unknown = [name for name in names if name not in NAMES]
    if remat == 'full':
        return policies.nothing_saveable
    if remat == 'dots':
        return policies.dots_with_no_batch_dims_saveable
    if verb in ('save', 'offload') and names and not unknown:
        if verb == 'save':
            return policies.save_only_these_names(*names)
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=names,
            offload_src='device',
            offload_dst='pinned_host',
        )
    raise ValueError(
        f"compute.remat={remat!r}: expected 'none', 'full', 'dots', 'save:NAMES' or 'offload:NAMES' "
        f'with names from {", ".join(NAMES)}'
    )
