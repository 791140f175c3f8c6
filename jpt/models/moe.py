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
from jpt.models.config import Activation, Experts, ModelConfig
from jpt.models.layers import recomputed
from jpt.models.mlp import ACTIVATIONS, MLP
from jpt.models.routing import RouterSums, choose, router_sums, within_capacity
from jpt.quant.dot import dot, grouped_dot


class Router(nn.Module):
    """Logits [..., E] of every expert, at least float32, and the bias that corrects the choice, where there is one."""

    experts: Experts

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        count = self.experts.count
        init = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal', in_axis=-1, out_axis=-2)
        kernel = self.param('kernel', init, (count, x.shape[-1]))
        logits = dot(x.astype(jnp.promote_types(x.dtype, jnp.float32)), kernel)
        correction = self.param('correction', nn.initializers.zeros, (count,)) if self.experts.corrected else None
        return logits, correction


class ExpertKernels(nn.Module):
    """The kernels of one linear map of all experts, [E, out, in]."""

    shape: tuple[int, int, int]
    residual_scale: float = 1.0

    @nn.compact
    def __call__(self) -> Any:
        if not self.is_initializing():
            return self.get_variable('params', 'kernel')  # any weight type, see Linear
        init = nn.initializers.variance_scaling(
            self.residual_scale**2, 'fan_in', 'normal', in_axis=-1, out_axis=-2, batch_axis=0
        )
        return self.param('kernel', init, self.shape)


class ExpertMLPs(nn.Module):
    """The weights of all experts' MLPs, by name."""

    cfg: ModelConfig
    experts: Experts

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        cfg, count, inner = self.cfg, self.experts.count, self.experts.width
        weights = {'up': ExpertKernels((count, inner, cfg.width), name='up')()}
        if cfg.gated_mlp:
            weights['gate'] = ExpertKernels((count, inner, cfg.width), name='gate')()
        scale = (2 * cfg.num_layers) ** -0.5
        weights['down'] = ExpertKernels((count, cfg.width, inner), scale, name='down')()
        for name, kernel in weights.items():
            # How many experts are here, the exchange knows.
            expected = (cfg.width, inner) if name == 'down' else (inner, cfg.width)
            if kernel.shape[1:] != expected:
                raise ValueError(f'experts/{name}/kernel has shape {kernel.shape}: expected (experts, *{expected})')
        return weights


def run_experts(name: Activation, weights: dict[str, Any], rows: Rows) -> jax.Array:
    """The experts' MLPs on rows [M, D] sorted by expert: down(act(gate x) * up x), or down(act(up x))."""
    activation = ACTIVATIONS[name]
    up = checkpoint_name(grouped_dot(rows.x_MD, weights['up'], rows.sizes_E), 'mlp_up')
    if 'gate' in weights:
        gate = checkpoint_name(grouped_dot(rows.x_MD, weights['gate'], rows.sizes_E), 'mlp_gate')
        inner = recomputed(lambda gate, up: activation(gate) * up)(gate, up)
    else:
        inner = recomputed(activation)(up)
    return grouped_dot(inner, weights['down'], rows.sizes_E)


class MoE(nn.Module):
    """The mixture in place of an MLP: [B, T, D] -> [B, T, D], and the router's sums over real tokens (segment > 0)."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, segments_BT: jax.Array) -> tuple[jax.Array, RouterSums]:
        cfg, experts = self.cfg, self.cfg.experts
        assert experts is not None
        batch, length = x_BTD.shape[:2]
        logits_BTE, correction_E = Router(experts, name='router')(x_BTD)
        logits_ME = logits_BTE.reshape(batch * length, experts.count)
        choice = choose(experts, logits_ME, correction_E)
        per_token = (batch, length, experts.per_token)
        # Padding goes to no expert, and takes no room.
        real_MJ = (segments_BT > 0).reshape(-1, 1)
        wanted_MJ = jnp.where(real_MJ, choice.ids_MJ, experts.count)
        ids_MJ = within_capacity(experts, wanted_MJ)
        mixed_BTD, late = mixture(
            partial(run_experts, cfg.activation),
            x_BTD,
            ids_MJ.reshape(per_token),
            choice.weights_MJ.reshape(per_token).astype(x_BTD.dtype),
            ExpertMLPs(cfg, experts, name='experts')(),
            experts.count,
        )
        if experts.shared_width:
            mixed_BTD = mixed_BTD + MLP(cfg, experts.shared_width, name='shared')(x_BTD)
        dropped = jnp.sum(ids_MJ != wanted_MJ, dtype=logits_ME.dtype)
        return mixed_BTD, router_sums(experts, logits_ME, choice, segments_BT)._replace(late=late, dropped=dropped)
