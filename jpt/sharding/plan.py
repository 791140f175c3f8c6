"""The plan of a step: how parameters, batch and layers are divided over a mesh, and what it says to the user."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jpt.models.config import ModelConfig
from jpt.sharding.layout import Layout, make_layout, to_device_layout
from jpt.sharding.rules import Rules, param_specs, units_of

Tree = Any


class Plan(NamedTuple):
    """How a step is divided: mesh, layouts, specs, microbatches.

    layouts: of 'model' and of every whole frozen model beside it ('teacher'). specs, frozen_specs: PartitionSpecs of
    the trainable and the frozen trees in the device layout.
    """

    mesh: Mesh
    layouts: dict[str, Layout]
    specs: Tree
    frozen_specs: Tree
    num_microbatches: int = 1
    schedule: Literal['1f1b', 'gpipe'] = '1f1b'
    dtype: DTypeLike | None = None  # in which weights travel where they are gathered


def make_plan(
    mesh: Mesh,
    configs: Mapping[str, ModelConfig],
    params: Tree,
    frozen: Mapping[str, Tree],
    *,
    num_microbatches: int = 1,
    chunks: int = 1,
    schedule: Literal['1f1b', 'gpipe'] = '1f1b',
    dtype: DTypeLike | None = None,
) -> Plan:
    """The plan of a training step, from canonical trees (arrays or ShapeDtypeStructs).

    configs: of 'model' and of every other tree in `frozen`. params, frozen: as in an objective, `frozen['model']` being
    the complement of `params`. chunks: virtual pipeline stages per device.

    Raises:
        ValueError: an unknown schedule, too few layers for the stages, a parameter that its rule cannot place.
    """
    if schedule not in ('1f1b', 'gpipe'):
        raise ValueError(f"pipeline schedule={schedule!r}: expected '1f1b' or 'gpipe'")
    if schedule == 'gpipe' and chunks > 1:
        raise ValueError(f"pipeline chunks={chunks}: schedule 'gpipe' has one chunk per device, '1f1b' may have more")
    layouts, placed = {}, {}
    for name, config in configs.items():
        if config.state_space is not None and mesh.shape['context'] > 1:
            raise ValueError(
                f'mesh.context={mesh.shape["context"]}: {name} ({config.family}) has layers that carry a state along '
                'the sequence: expected 1'
            )
        whole = _union(params, frozen['model']) if name == 'model' else frozen[name]
        layouts[name] = make_layout(whole, mesh.shape, chunks, config.experts)
    # Equal columns of all models lie on the same device, whatever vocabularies they have.
    rows = max(layout.padded_vocab for layout in layouts.values())
    layouts = {name: dataclasses.replace(layout, padded_vocab=rows) for name, layout in layouts.items()}
    for name, config in configs.items():
        rules = Rules(mesh.shape, units_of(config), layouts[name].staged)
        placed[name] = functools.partial(_specs_of, layouts[name], rules)
    frozen_specs = {name: placed[name](tree) for name, tree in frozen.items()}
    return Plan(mesh, layouts, placed['model'](params), frozen_specs, num_microbatches, schedule, dtype)


def _specs_of(layout: Layout, rules: Rules, tree: Tree) -> Tree:
    return param_specs(jax.eval_shape(functools.partial(to_device_layout, layout), tree), rules)


def _union(one: Tree, other: Tree) -> Tree:
    return jax.tree.map(lambda a, b: b if a is None else a, one, other, is_leaf=lambda leaf: leaf is None)
