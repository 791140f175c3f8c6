"""AdamW, Muon and SGD over the trainable tree: what each leaf gets, and the update, one fused pass per leaf.

Own code and not optax for three things that do not fit there in one pass: moments in 8 and 16 bits, rules by the role
of a stacked leaf, and leaving everything as it was when a step is refused. In float32 it is AdamW as optax computes it
(a test), and a little faster: 6.9 M parameters, clipping included, take 22 ms of CPU time against 27 ms in optax.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jpt.config import require
from jpt.quant.paths import map_with_path, matches
from jpt.training import low_bit, muon
from jpt.training.schedule import Schedule

Role = Literal['kernel', 'lora', 'head', 'embedding', 'norm', 'bias']
Rule = Literal['adamw', 'muon', 'sgd']

# The first pattern that matches the path of a leaf says its role. Leaves are stacked, so ndim would say nothing.
ROLES: tuple[tuple[str, Role], ...] = (
    ('**/kernel/{a,b}', 'lora'),
    ('lm_head/kernel', 'head'),
    ('**/kernel', 'kernel'),
    ('**/embedding', 'embedding'),
    ('**/scale', 'norm'),
    ('**/bias', 'bias'),
    ('**/{sinks,a_log,dt_bias,skip}', 'bias'),
    ('**/filter', 'norm'),
    ('**/correction', 'bias'),  # has no gradient, see jpt.training.router
    ('**/{k_scale,v_scale}', 'bias'),  # nor have scales of a cache, see jpt.training.freeze
)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated; the learning rate is the schedule's."""

    name: Rule = 'adamw'  # 'muon': Muon for the kernels of layers, AdamW for all else
    b1: float = 0.9  # adamw: decay of the mean gradient; sgd: momentum
    b2: float = 0.95  # adamw: decay of the mean square
    eps: float = 1e-8
    weight_decay: float = 0.1  # of kernels, head and LoRA factors; times the learning rate
    decay_embeddings: bool = False  # also of embedding tables, which are the head where weights are tied
    clip_norm: float | None = 1.0  # largest norm of the whole gradient
    moments: low_bit.Precision = 'float32'  # of leaves of 4,096 elements and more
    muon_momentum: float = 0.95
    muon_nesterov: bool = True
    muon_steps: int = 5  # Newton-Schulz iterations
    muon_scale: muon.Scale = 'rms'  # 'rms' takes AdamW's learning rates, 'spectral' its own
    muon_lr_multiplier: float = 1.0  # learning rate of Muon's leaves, in units of the schedule's
    muon_dtype: Literal['float32', 'bfloat16'] = 'float32'  # of the iterations

    def __post_init__(self) -> None:
        for field in ('b1', 'b2', 'muon_momentum'):
            require(self, field, 0 <= getattr(self, field) < 1, 'a number in [0, 1)')
        require(self, 'eps', self.eps > 0, 'a positive number')
        require(self, 'weight_decay', self.weight_decay >= 0, 'a number of 0 or more')
        require(self, 'clip_norm', self.clip_norm is None or self.clip_norm > 0, 'a positive number or None')
        require(self, 'muon_steps', self.muon_steps > 0, 'a positive integer')
        require(self, 'muon_lr_multiplier', self.muon_lr_multiplier > 0, 'a positive number')


class OptimizerState(NamedTuple):
    """Number of updates made, and moments in trees of the params' structure (None where a rule needs none)."""

    updates: jax.Array  # int32 []
    mu: Any
    nu: Any


class Optimizer(NamedTuple):
    """Pure functions; trees may have None for frozen leaves.

    init: params -> OptimizerState, also under jax.eval_shape.
    update: (gradients, state, params, accept=True) -> (params, state, {'grad_norm', 'lr', 'accepted'}). Where `accept`
    is False or the gradient's norm is not finite, params and state come back unchanged, bit by bit.
    """

    init: Callable[[Any], OptimizerState]
    update: Callable[..., tuple[Any, OptimizerState, dict[str, jax.Array]]]


class LeafPlan(NamedTuple):
    """What one leaf gets."""

    role: Role
    rule: Rule
    decay: float


def role_of(path: str) -> Role:
    """The role of a leaf by its path.

    Raises:
        ValueError: a path that no rule covers.
    """
    for pattern, role in ROLES:
        if matches(pattern, path):
            return role
    raise ValueError(f'optimizer: no role for the parameter {path!r}: expected one of {[p for p, _ in ROLES]}')


def plan_of(path: str, config: OptimizerConfig) -> LeafPlan:
    """Which rule and which decay the leaf at a path gets."""
    role = role_of(path)
    rule: Rule = 'adamw' if config.name == 'muon' and role != 'kernel' else config.name
    decays = role in ('kernel', 'head', 'lora') or (role == 'embedding' and config.decay_embeddings)
    return LeafPlan(role, rule, config.weight_decay if decays else 0.0)


def global_norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all leaves together, summed in at least float32."""
    squares = [jnp.sum(jnp.square(leaf.astype(_wide(leaf)))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares[1:], start=squares[0]))


def make_optimizer(config: OptimizerConfig, schedule: Schedule) -> Optimizer:
    """The optimizer that a config describes."""

    def init(params: Any) -> OptimizerState:
        mu = jax.tree.map(lambda leaf: low_bit.zeros(leaf.shape, _wide(leaf), config.moments, signed=True), params)

        def second(path: str, leaf: jax.Array) -> Any:
            if plan_of(path, config).rule == 'adamw':
                return low_bit.zeros(leaf.shape, _wide(leaf), config.moments, signed=False)
            return None

        return OptimizerState(jnp.zeros((), jnp.int32), mu, map_with_path(second, params))

    def update(
        gradients: Any, state: OptimizerState, params: Any, accept: jax.Array | bool = True
    ) -> tuple[Any, OptimizerState, dict[str, jax.Array]]:
        norm = global_norm(gradients)
        accept = jnp.logical_and(accept, jnp.isfinite(norm))
        clip = jnp.ones_like(norm) if config.clip_norm is None else jnp.minimum(1, config.clip_norm / norm)
        made = state.updates + 1
        step = _Step(config, schedule(state.updates), clip, accept, made)
        leaves = map_with_path(lambda *leaf: _update_leaf(step, *leaf), params, gradients, state.mu, state.nu)
        params, mu, nu = (_column(leaves, index) for index in range(3))
        state = OptimizerState(jnp.where(accept, made, state.updates), mu, nu)
        return params, state, {'grad_norm': norm, 'lr': step.lr, 'accepted': accept}

    return Optimizer(init, update)


class _Updated(NamedTuple):
    """One leaf and its moments after an update."""

    param: jax.Array
    mu: Any
    nu: Any


class _Step(NamedTuple):
    """What all leaves of one update share."""

    config: OptimizerConfig
    lr: jax.Array
    clip: jax.Array
    accept: jax.Array
    made: jax.Array  # updates, this one included


def _update_leaf(step: _Step, path: str, param: jax.Array, gradient: jax.Array, mu: Any, nu: Any) -> _Updated:
    """One leaf after the update, or as it was where the step is refused. All elementwise but Muon's products."""
    config, plan, wide = step.config, plan_of(path, step.config), _wide(param)
    gradient = gradient.astype(wide) * step.clip.astype(wide)
    before, lr = low_bit.load(mu, wide), step.lr.astype(wide)
    new_nu = None
    match plan.rule:
        case 'adamw':
            new_mu, mean = _written(step, path, config.b1 * before + (1 - config.b1) * gradient, mu)
            square = config.b2 * low_bit.load(nu, wide) + (1 - config.b2) * jnp.square(gradient)
            new_nu, square = _written(step, f'{path} nu', square, nu)
            made = step.made.astype(wide)
            mean_hat, square_hat = mean / (1 - config.b1**made), square / (1 - config.b2**made)
            direction = mean_hat / (jnp.sqrt(square_hat) + config.eps)
        case 'muon':
            new_mu, mean = _written(step, path, config.muon_momentum * before + gradient, mu)
            ahead = gradient + config.muon_momentum * mean if config.muon_nesterov else mean
            turned = muon.orthogonalize(ahead, config.muon_steps, jnp.dtype(config.muon_dtype)).astype(wide)
            direction = muon.scale_of(param.shape, config.muon_scale) * turned
            lr = lr * config.muon_lr_multiplier
        case 'sgd':
            new_mu, direction = _written(step, path, config.b1 * before + gradient, mu)
    old = param.astype(wide)
    new_param, _ = _written(step, f'{path} param', old - lr * (direction + plan.decay * old), param)
    return _Updated(new_param, new_mu, new_nu)


def _written(step: _Step, name: str, value: jax.Array, stale: Any) -> tuple[Any, jax.Array]:
    """The new value in the form of the stale one, or the stale one where the step is refused; and what to go on with.

    That is what was written, where writing is exact: so XLA updates the moment in place, which makes the pass three
    times as fast on a CPU (seen: 66 to 22 ms), since a reader of the old moment would make it copy that first.
    """
    salt = low_bit.salt(step.made, zlib.crc32(name.encode()) & 0x7FFFFFFF)
    fresh = low_bit.store(value, stale, salt)
    written = jax.tree.map(lambda new, old: jnp.where(step.accept, new, old), fresh, stale)
    exact = isinstance(written, jax.Array) and written.dtype == value.dtype
    return written, written if exact else value


def _column(leaves: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], leaves, is_leaf=lambda leaf: isinstance(leaf, _Updated))


def _wide(leaf: jax.Array) -> jnp.dtype:
    return jnp.promote_types(leaf.dtype, jnp.float32)
