"""One layer, and which of its intermediate results the backward pass may keep."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from jpt.kernels.grouped_matmul import PRODUCT
from jpt.models.attention import Attention, Where
from jpt.models.cache import LayerCache
from jpt.models.config import Compute, LayerKind, ModelConfig
from jpt.models.latent_attention import LatentAttention
from jpt.models.layers import norm
from jpt.models.mamba import Mamba
from jpt.models.mlp import MLP
from jpt.models.moe import MoE
from jpt.models.routing import RouterSums
from jpt.quant.producers import Deferred, Given

NAMES = ('query', 'key', 'value', 'attention', 'mlp_gate', 'mlp_up', 'ssd')


class Layered(NamedTuple):
    """What a layer returns: the residual stream [B, T, D] behind it, and what is beside it."""

    hidden_BTD: jax.Array
    cache: LayerCache | None  # with what these tokens add
    router: RouterSums | None  # where the layer has one
    mixed_BTD: jax.Array | None  # what the mixer added to the residual stream, see models/taps.py


class Block(nn.Module):
    """A layer: a mixer of tokens, then MLP or experts, each added to the residual stream. [B, T, D] -> [B, T, D]."""

    cfg: ModelConfig
    kind: LayerKind
    compute: Compute

    @nn.compact
    def __call__(self, hidden_BTD: jax.Array, where: Where, cache: LayerCache | None = None) -> Layered:
        cfg, kind, sums, mixed_BTD = self.cfg, self.kind, None, None
        if kind.mixer != 'none':
            name = 'mamba' if kind.mixer == 'mamba' else 'attn'
            mixer = _mixer(cfg, kind)(cfg, kind, self.compute, name=name)
            mixed_BTD, cache = mixer(self._normed(name, hidden_BTD), where, cache)
            mixed_BTD = self._part(name, mixed_BTD)
            hidden_BTD = self._added(name, hidden_BTD, mixed_BTD)
        if kind.experts:
            inner_BTD, sums = MoE(cfg, self.compute.exchange, name='mlp')(
                self._normed('mlp', hidden_BTD), where.segments_BT
            )
            hidden_BTD = self._added('mlp', hidden_BTD, self._part('mlp', inner_BTD))
        elif kind.mlp_width:
            inner_BTD = MLP(cfg, kind.mlp_width, name='mlp')(self._normed('mlp', hidden_BTD))
            hidden_BTD = self._added('mlp', hidden_BTD, self._part('mlp', inner_BTD))
        return Layered(hidden_BTD, cache, sums, mixed_BTD)

    def _normed(self, name: str, hidden_BTD: jax.Array) -> Deferred:
        """What a part of the layer reads, [B, T, D]."""
        return norm(self.cfg, f'{name}_norm').deferred(hidden_BTD) if self.cfg.pre_norms else Given(hidden_BTD)

    def _part(self, name: str, part_BTD: jax.Array) -> jax.Array:
        """What is added to the residual stream of what a part of the layer returns."""
        return norm(self.cfg, f'{name}_post_norm')(part_BTD) if self.cfg.post_norms else part_BTD

    def _added(self, name: str, hidden_BTD: jax.Array, part_BTD: jax.Array) -> jax.Array:
        """The residual stream with a part of the layer."""
        summed_BTD = hidden_BTD + part_BTD
        if self.cfg.residual_norms:
            summed_BTD = norm(self.cfg, f'{name}_norm')(summed_BTD)
        return self.compute.place(summed_BTD, ('batch', 'length', None))


def _mixer(cfg: ModelConfig, kind: LayerKind) -> Callable[..., Any]:
    if kind.mixer == 'mamba':
        return Mamba
    return Attention if cfg.latent is None else LatentAttention


def apply_block(cfg: ModelConfig, kind: LayerKind, compute: Compute) -> Callable[..., Layered]:
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
        # A policy sees no product inside a kernel or a loop: grouped products are known by their name.
        grouped = policies.save_only_these_names(PRODUCT)
        return policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, grouped)
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
