"""Where every parameter lies: one table of logical axes per leaf, one table from logical axes to mesh axes."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jpt.models.config import ModelConfig
from jpt.quant.tensors import QTensor

Keys = tuple[str, ...]

# The last keys of a leaf's path -> the logical axes of its last dimensions. Leaves under 'layers' are stacked before
# these: [R, ...] in the canonical layout, [pipe, chunks, slots, ...] when laid out for pipeline stages.
LOGICAL_AXES: dict[str, tuple[str | None, ...]] = {
    'embed/embedding': ('vocab', 'embed'),
    'lm_head/kernel': ('vocab', 'embed'),
    'join/kernel': (None, 'embed'),
    'to_teacher/kernel': (None, 'embed'),
    'hidden_norm/scale': (None,),
    'norm/scale': (None,),
    'positions/embedding': (None, 'embed'),
    'final_norm/scale': (None,),
    'final_norm/bias': (None,),
    'token_types/embedding': (None, 'embed'),
    'embed_norm/scale': (None,),
    'embed_norm/bias': (None,),
    'mlm/dense/kernel': (None, 'embed'),
    'mlm/norm/scale': (None,),
    'mlm/norm/bias': (None,),
    'mlm/output/bias': (None,),
    'pooler/dense/kernel': (None, 'embed'),
    'next_sentence/dense/kernel': (None, 'embed'),
    'dense/bias': (None,),
    'attn/q/kernel': ('heads', 'embed'),
    'attn/k/kernel': ('kv_heads', 'embed'),
    'attn/v/kernel': ('kv_heads', 'embed'),
    'attn/out/kernel': ('embed', 'heads'),
    'attn/q_down/kernel': (None, 'embed'),
    'attn/kv_down/kernel': (None, 'embed'),
    'attn/q_up/kernel': ('heads', None),
    'attn/kv_up/kernel': ('heads', None),
    'attn/q_down/bias': (None,),
    'attn/kv_down/bias': (None,),
    'attn/kv_norm/scale': (None,),
    'attn/q/bias': ('heads',),
    'attn/k/bias': ('kv_heads',),
    'attn/v/bias': ('kv_heads',),
    'attn/out/bias': (None,),
    'attn/q_norm/scale': (None,),
    'attn/k_norm/scale': (None,),
    'mlp/up/kernel': ('mlp', 'embed'),
    'mlp/gate/kernel': ('mlp', 'embed'),
    'mlp/down/kernel': ('embed', 'mlp'),
    'mlp/up/bias': ('mlp',),
    'mlp/gate/bias': ('mlp',),
    'mlp/down/bias': (None,),
    'router/kernel': (None, None),
    'router/correction': (None,),
    'router/bias': (None,),
    'experts/up/bias': ('expert', 'mlp'),
    'experts/gate/bias': ('expert', 'mlp'),
    'experts/down/bias': ('expert', None),
    'attn/sinks': ('heads',),
    'attn/k_scale': (),
    'attn/v_scale': (),
    'latent_in/kernel': (None, 'embed'),
    'latent_out/kernel': ('embed', None),
    'latent_in/bias': (None,),
    'latent_out/bias': (None,),
    'shared/up/bias': ('mlp',),
    'shared/gate/bias': ('mlp',),
    'shared/down/bias': (None,),
    'mamba/gate/kernel': ('ssm_heads', 'embed'),
    'mamba/x/kernel': ('ssm_heads', 'embed'),
    'mamba/b/kernel': ('ssm_groups', 'embed'),
    'mamba/c/kernel': ('ssm_groups', 'embed'),
    'mamba/dt/kernel': ('ssm_heads', 'embed'),
    'mamba/out/kernel': ('embed', 'ssm_heads'),
    'mamba/gate/bias': ('ssm_heads',),
    'mamba/x/bias': ('ssm_heads',),
    'mamba/b/bias': ('ssm_groups',),
    'mamba/c/bias': ('ssm_groups',),
    'mamba/dt/bias': ('ssm_heads',),
    'mamba/out/bias': (None,),
    'conv_x/filter': ('ssm_heads', None, None),
    'conv_b/filter': ('ssm_groups', None, None),
    'conv_c/filter': ('ssm_groups', None, None),
    'conv_x/bias': ('ssm_heads',),
    'conv_b/bias': ('ssm_groups',),
    'conv_c/bias': ('ssm_groups',),
    'mamba/a_log': ('ssm_heads',),
    'mamba/dt_bias': ('ssm_heads',),
    'mamba/skip': ('ssm_heads',),
    'mamba/norm/scale': ('ssm_heads',),
    'mamba_norm/scale': (None,),
    'experts/up/kernel': ('expert', 'mlp', 'embed'),
    'experts/gate/kernel': ('expert', 'mlp', 'embed'),
    'experts/down/kernel': ('expert', 'embed', 'mlp'),
    'shared/up/kernel': ('mlp', 'embed'),
    'shared/gate/kernel': ('mlp', 'embed'),
    'shared/down/kernel': ('embed', 'mlp'),
    'attn_norm/scale': (None,),
    'attn_norm/bias': (None,),
    'attn_post_norm/scale': (None,),
    'mlp_norm/scale': (None,),
    'mlp_norm/bias': (None,),
    'mlp_post_norm/scale': (None,),
}

MESH_AXES: dict[str, tuple[str, ...]] = {
    'vocab': ('pipe', 'tensor'),
    'heads': ('tensor',),
    'kv_heads': ('tensor',),
    'ssm_heads': ('tensor',),
    'ssm_groups': ('tensor',),
    'mlp': ('tensor',),
    'embed': ('fsdp',),
    'expert': ('expert',),
    'stage': ('pipe',),
    'layer': ('pipe',),
}

STAGED = ('stage', None, None)  # [pipe, chunks, slots, ...]


class Units(NamedTuple):
    """How many pieces a logical axis may be cut into at most evenly: whole heads, whatever a head's size is."""

    heads: int
    kv_heads: int
    ssm_heads: int = 1
    ssm_groups: int = 1


# Held whole by every device where `tensor` does not divide them.
REPLICABLE = ('kv_heads', 'ssm_groups')
LAYER = 'layer'  # of stacks [R, ...] in the canonical layout; likewise whole where `pipe` does not divide R


def units_of(cfg: ModelConfig) -> Units:
    space = cfg.state_space
    of_space = () if space is None else (space.num_heads, space.groups)
    return Units(cfg.num_heads, cfg.num_kv_heads, *of_space)


class Rules(NamedTuple):
    """Everything param_specs needs besides the shapes."""

    sizes: Mapping[str, int]  # of the mesh axes
    units: Units
    staged: bool = False  # leaves under 'layers' begin with [pipe, chunks, slots] instead of [R]
    logical_axes: Mapping[str, tuple[str | None, ...]] = LOGICAL_AXES
    mesh_axes: Mapping[str, tuple[str, ...]] = MESH_AXES


def path_keys(path: tuple[Any, ...]) -> Keys:
    """A tree path as plain strings: dict keys, list indices and attribute names alike."""
    return tuple(str(getattr(key, 'key', getattr(key, 'idx', getattr(key, 'name', key)))) for key in path)


def logical_axes(keys: Keys, table: Mapping[str, tuple[str | None, ...]] = LOGICAL_AXES) -> tuple[str | None, ...]:
    """The logical axes of a leaf without its stacking; low-rank factors take theirs from the kernel they add to.

    Raises:
        ValueError: the table has no entry for the end of this path.
    """
    for end in range(len(keys), 0, -1):
        for length in (3, 2):
            axes = table.get('/'.join(keys[max(end - length, 0) : end]))
            if axes is not None:
                return _within_weight(axes, keys[end:])
    known = ', '.join(table)
    raise ValueError(f'no sharding rule for parameter {"/".join(keys)}: expected a path that ends in one of {known}')


def _within_weight(axes: tuple[str | None, ...], attributes: Keys) -> tuple[str | None, ...]:
    """The axes of a part of a composite weight: `a` [rank, in] and `b` [out, rank] of a LoraKernel, or the weight's."""
    if attributes[-1:] == ('a',):
        return (None, axes[1])
    if attributes[-1:] == ('b',):
        return (axes[0], None)
    if attributes[-1:] == ('input_scale',):  # of a FakeQuant, as the next
        return axes[:-2]
    if attributes[-1:] == ('scale_2',):
        return (*axes[:-2], None, None)
    return axes


def leaf_spec(keys: Keys, shape: tuple[int, ...], rules: Rules) -> P:
    """How one parameter lies on the mesh; every mesh axis of size 1 is left out of the result.

    Raises:
        ValueError: no rule, the wrong number of dimensions, two dimensions on one mesh axis, or a size that the mesh
            does not divide.
    """
    name = '/'.join(keys)
    axes = logical_axes(keys, rules.logical_axes)
    if 'layers' in keys:
        axes = (*(STAGED if rules.staged else (LAYER,)), *axes)
    if len(axes) != len(shape):
        raise ValueError(f'parameter {name} has shape {shape}: its sharding rule {axes} is for {len(axes)} dimensions')
    parts: list[tuple[str, ...]] = []
    for dim, (axis, size) in enumerate(zip(axes, shape, strict=True)):
        wanted = rules.mesh_axes[axis] if axis is not None else ()
        used = tuple(mesh_axis for mesh_axis in wanted if rules.sizes.get(mesh_axis, 1) > 1)
        parts.append(_checked(name, shape, dim, axis, size, used, rules))
    flat = [mesh_axis for part in parts for mesh_axis in part]
    doubled = sorted({mesh_axis for mesh_axis in flat if flat.count(mesh_axis) > 1})
    if doubled:
        raise ValueError(
            f'parameter {name} {shape} with logical axes {axes} puts two dimensions on {", ".join(doubled)}'
        )
    return P(*(part[0] if len(part) == 1 else (part or None) for part in parts))


def _checked(
    name: str, shape: tuple[int, ...], dim: int, axis: str | None, size: int, used: tuple[str, ...], rules: Rules
) -> tuple[str, ...]:
    """The mesh axes of one dimension, or none where it is replicated by rule; raises where they do not divide it."""
    over = math.prod(rules.sizes[mesh_axis] for mesh_axis in used)
    pieces = getattr(rules.units, axis, size) if axis in Units._fields else size
    if axis in (*REPLICABLE, LAYER) and pieces % over:
        return ()
    if pieces % over or size % over:
        shown = ' * '.join(f'{mesh_axis}={rules.sizes[mesh_axis]}' for mesh_axis in used)
        raise ValueError(
            f'parameter {name} {shape}: dimension {dim} ({axis}, {pieces} pieces) is not a multiple of {shown}'
        )
    return used


def param_specs(params: Any, rules: Rules) -> Any:
    """The PartitionSpec of every leaf of a parameter tree (arrays or ShapeDtypeStructs), in the tree's own shape.

    The parts of a quantized weight lie by that of the weight, see `QTensor.part_specs`.

    Raises:
        ValueError: see `leaf_spec`; or blocks of inputs that would straddle shards.
    """

    def specs_of(path: tuple[Any, ...], leaf: Any) -> Any:
        spec = leaf_spec(path_keys(path), leaf.shape, rules)
        if not isinstance(leaf, QTensor):
            return spec
        _check_inputs('/'.join(path_keys(path)), leaf, spec, rules)
        return leaf.part_specs(spec, rules.sizes)

    return jax.tree_util.tree_map_with_path(specs_of, params, is_leaf=lambda leaf: isinstance(leaf, QTensor))


def _check_inputs(name: str, weight: QTensor, spec: P, rules: Rules) -> None:
    """Inputs that lie in shards are rounded in blocks where they lie: no block may straddle two of them."""
    form, inner = weight.format, spec[-1] or ()
    shards = rules.sizes.get('tensor', 1) if 'tensor' in ((inner,) if isinstance(inner, str) else inner) else 1
    if shards > 1 and form.inputs == 'block' and weight.shape[-1] % (shards * form.input_block):
        raise ValueError(
            f'parameter {name} {weight.shape}: its inputs lie on tensor={shards} shards and are rounded in blocks of '
            f'{form.input_block}: expected a multiple of {shards * form.input_block} inputs, or another format for it'
        )


def state_specs(state: Any, params: Any, specs: Any, sizes: Mapping[str, int]) -> Any:
    """The PartitionSpec of every leaf of an optimizer state (or of any tree that holds copies of the parameter tree).

    A leaf that stands where a parameter stands takes its spec, dimension by dimension where it divides; all others
    (counters, statistics of another rank) are replicated.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    spec_leaves = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, P))
    known = {path_keys(path): spec for (path, _), spec in zip(flat, spec_leaves, strict=True)}

    def spec_of(path: tuple[Any, ...], leaf: Any) -> P:
        spec = _spec_at(path_keys(path), known)
        if spec is None or len(spec) != leaf.ndim:
            return P()
        return P(
            *(part if size % _ways(part, sizes) == 0 else None for part, size in zip(spec, leaf.shape, strict=True))
        )

    return jax.tree_util.tree_map_with_path(spec_of, state)


def storage_specs(specs: Any, stored: Any, sizes: Mapping[str, int]) -> Any:
    """How a tree in the canonical layout lies on a mesh while it is read, saved or restored.

    specs: of its leaves in the device layout. stored: arrays or shapes of the canonical one. A dimension keeps the mesh
    axes that divide it; an axis that does not (`pipe`, for seven layers on four stages; those of a vocabulary without
    its padding) goes to the first dimension that it divides, so that no device holds a whole leaf for want of padding.
    Nothing is computed in this layout, so nothing can collide.
    """
    return map_specs(lambda spec, leaf: _storage_spec(spec, tuple(leaf.shape), sizes), specs, stored)


def _storage_spec(spec: P, shape: tuple[int, ...], sizes: Mapping[str, int]) -> P:
    wanted = [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in spec]
    if len(wanted) == len(shape) + 2:  # [pipe, chunks, slots, ...] is [R, ...] in storage
        wanted = [(*wanted[0], *wanted[1], *wanted[2]), *wanted[3:]]
    parts: list[tuple[str, ...]] = [() for _ in shape]
    order = [(axis, [dim]) for dim, axes in enumerate(wanted) for axis in axes]
    everywhere = list(range(len(shape)))
    for axis, dims in order + [(axis, everywhere) for axis, _ in order]:  # first at home, then wherever it fits
        if any(axis in part for part in parts):
            continue
        for dim in dims:
            if shape[dim] % (_ways(parts[dim], sizes) * sizes[axis]) == 0:
                parts[dim] = (*parts[dim], axis)
                break
    return P(*(part[0] if len(part) == 1 else (part or None) for part in parts))


def _spec_at(keys: Keys, known: Mapping[Keys, P]) -> P | None:
    for start in range(len(keys)):
        for end in range(len(keys), start, -1):
            if keys[start:end] in known:
                return known[keys[start:end]]
    return None


def _ways(part: Any, sizes: Mapping[str, int]) -> int:
    axes = () if part is None else (part,) if isinstance(part, str) else part
    return math.prod(sizes[axis] for axis in axes)


def shardings(mesh: Mesh, specs: Any) -> Any:
    """NamedShardings for a tree of PartitionSpecs."""
    return map_specs(lambda spec: NamedSharding(mesh, spec), specs)


def map_specs(function: Callable[..., Any], specs: Any, *rest: Any) -> Any:
    """jax.tree.map over a tree of PartitionSpecs (and others of its shape)."""
    return jax.tree.map(function, specs, *rest, is_leaf=lambda leaf: isinstance(leaf, P))


def keep_axes(spec: P, axes: frozenset[str]) -> P:
    """The same spec with every mesh axis outside `axes` left out (what shard_map wants to hear of its manual axes)."""

    def part(entry: Any) -> Any:
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        kept = tuple(name for name in names if name in axes)
        return kept[0] if len(kept) == 1 else (kept or None)

    return P(*(part(entry) for entry in spec))


def used_axes(spec: P) -> frozenset[str]:
    """The mesh axes that a spec mentions."""
    return frozenset(axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ()))
