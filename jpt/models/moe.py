"""A mixture of experts: a router, the experts' MLPs in grouped products, and an MLP that all tokens share.

Nothing is dropped: tokens are sorted by expert, every expert works on the tokens that chose it, and the results go back
to where the tokens came from.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jpt.kernels.expert_parallel import Rows, mixture
from jpt.models.config import Experts, ModelConfig
from jpt.models.expert_statistics import expert_linear, observe_experts
from jpt.models.layers import Linear, along_last
from jpt.models.mlp import ACTIVATIONS, MLP, gated_unit
from jpt.models.routing import RouterSums, choose, router_sums, within_capacity
from jpt.quant.dot import dot
from jpt.quant.producers import Deferred, Gated, Given, dense_of, recomputed


class Router(nn.Module):
    """Logits [..., E] of every expert, at least float32, and the bias that corrects the choice, where there is one."""

    experts: Experts

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        count = self.experts.count
        init = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal', in_axis=-1, out_axis=-2)
        kernel = self.param('kernel', init, (count, x.shape[-1]))
        # All bits of float32, of which a GPU's products would drop 13: a near tie decides which experts compute.
        logits = dot(x.astype(jnp.promote_types(x.dtype, jnp.float32)), kernel, precision='highest')
        if self.experts.biases:
            bias = self.param('bias', nn.initializers.zeros, (count,))
            logits = logits + along_last(bias.astype(logits.dtype), logits)
        correction = self.param('correction', nn.initializers.zeros, (count,)) if self.experts.corrected else None
        return logits, correction


class ExpertLinear(nn.Module):
    """The weights of one linear map of all experts: a kernel [E, out, in], and a bias [E, out] where there is one."""

    shape: tuple[int, int, int]
    use_bias: bool
    residual_scale: float = 1.0

    @nn.compact
    def __call__(self) -> tuple[Any, jax.Array | None]:
        if self.is_initializing():
            init = nn.initializers.variance_scaling(
                self.residual_scale**2, 'fan_in', 'normal', in_axis=-1, out_axis=-2, batch_axis=0
            )
            kernel = self.param('kernel', init, self.shape)
            bias = self.param('bias', nn.initializers.zeros, self.shape[:2]) if self.use_bias else None
            return kernel, bias
        # Any weight type, see Linear; and how many experts are here, the exchange knows.
        kernel = self.get_variable('params', 'kernel')
        if kernel.shape[1:] != self.shape[1:]:
            raise ValueError(f'experts/{self.name}/kernel has shape {kernel.shape}: expected {self.shape}')
        return kernel, self.get_variable('params', 'bias') if self.use_bias else None


class ExpertMLPs(nn.Module):
    """The weights of all experts' MLPs, by the names of kernels/expert_parallel.py."""

    cfg: ModelConfig
    experts: Experts

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        cfg, experts = self.cfg, self.experts
        outer = experts.latent_width or cfg.width
        wide, narrow = (experts.count, experts.width, outer), (experts.count, outer, experts.width)
        maps = {'up': ExpertLinear(wide, experts.biases, name='up')()}
        if cfg.gated_mlp:
            maps['gate'] = ExpertLinear(wide, experts.biases, name='gate')()
        maps['down'] = ExpertLinear(narrow, experts.biases, (2 * cfg.num_layers) ** -0.5, name='down')()
        weights = {name: kernel for name, (kernel, _) in maps.items()}
        return weights | {f'{name}_bias': bias for name, (_, bias) in maps.items() if bias is not None}


def run_experts(cfg: ModelConfig, weights: dict[str, Any], rows: Rows) -> jax.Array:
    """The experts' MLPs on rows [M, D] sorted by expert: down(act(gate x) * up x), or down(act(up x))."""

    linear, read_MD = partial(expert_linear, weights, rows), Given(rows.x_MD)
    up = checkpoint_name(linear('up', read_MD), 'mlp_up')
    inner: Deferred
    if 'gate' in weights:
        gate = checkpoint_name(linear('gate', read_MD), 'mlp_gate')
        inner = Gated(gate, up, gated_unit(cfg))
    else:
        inner = Given(recomputed(ACTIVATIONS[cfg.activation])(up))
    return linear('down', inner)


class MoE(nn.Module):
    """The mixture in place of an MLP: [B, T, D] -> [B, T, D], and the router's sums over real tokens (segment > 0)."""

    cfg: ModelConfig
    exchange: str = 'padded'  # how tokens travel, see kernels/ragged_exchange.py

    @nn.compact
    def __call__(self, given_BTD: jax.Array | Deferred, segments_BT: jax.Array) -> tuple[jax.Array, RouterSums]:
        cfg, experts = self.cfg, self.cfg.experts
        assert experts is not None
        x_BTD = dense_of(given_BTD)
        batch, length = x_BTD.shape[:2]
        logits_BTE, correction_E = Router(experts, name='router')(x_BTD)
        logits_ME = logits_BTE.reshape(batch * length, experts.count)
        choice = choose(experts, logits_ME, correction_E)
        per_token = (batch, length, experts.per_token)
        # Padding goes to no expert, and takes no room.
        real_MJ = (segments_BT > 0).reshape(-1, 1)
        wanted_MJ = jnp.where(real_MJ, choice.ids_MJ, experts.count)
        ids_MJ = within_capacity(experts, wanted_MJ)
        inner_BTX = x_BTD
        if experts.latent_width is not None:
            inner_BTX = Linear(experts.latent_width, cfg.mlp_bias, name='latent_in')(given_BTD)
        ids_BTJ = ids_MJ.reshape(per_token)
        weights_BTJ = choice.weights_MJ.reshape(per_token).astype(x_BTD.dtype)
        kernels = ExpertMLPs(cfg, experts, name='experts')()
        observe_experts(self, cfg, inner_BTX, ids_BTJ, weights_BTJ, kernels, self.exchange)
        mixed_BTD, late = mixture(
            partial(run_experts, cfg),
            inner_BTX,
            ids_BTJ,
            weights_BTJ,
            kernels,
            experts.count,
            on_input=experts.on_input,
            exchange=self.exchange,
        )
        if experts.latent_width is not None:
            mixed_BTD = Linear(cfg.width, cfg.mlp_bias, name='latent_out')(mixed_BTD)
        if experts.shared_width:
            mixed_BTD = mixed_BTD + MLP(cfg, experts.shared_width, name='shared')(given_BTD)
        dropped = jnp.sum(ids_MJ != wanted_MJ, dtype=logits_ME.dtype)
        return mixed_BTD, router_sums(logits_ME, choice, segments_BT)._replace(late=late, dropped=dropped)
