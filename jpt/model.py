"""The face of jpt: a checkpoint opened as a model that gives logits and text, and is saved and exported."""

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike

from jpt.checkpoint.assets import open_tokenizer
from jpt.checkpoint.hf_export import export_hf
from jpt.checkpoint.model_dir import save_model
from jpt.checkpoint.opening import open_model
from jpt.checkpoint.source import LeafSource, assembled, leaves_of, load_tree
from jpt.data.tokenizer import Tokenizer
from jpt.generation.engine import GenerationResult, generate
from jpt.models.config import Compute, ModelConfig
from jpt.models.names import put
from jpt.models.transformer import KEPT, forward, last_name, unembed
from jpt.quant.dot import is_weight
from jpt.sharding.layout import laid_out, make_layout, to_device_layout
from jpt.sharding.mesh import use_mesh
from jpt.sharding.rules import Rules, param_specs, shardings, storage_specs, units_of


@dataclasses.dataclass(frozen=True)
class Model:
    """A model in memory: what it computes, its weights, and its tokenizer where it has one."""

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer | None = None
    assets: Path | None = None  # the directory that tokenizer files and generation_config.json were read from
    mesh: Mesh | None = None
    origin: Path | None = None  # the directory of the model that the weights were made from: its card is theirs

    @property
    def compute(self) -> Compute:
        """How it is run: in the widest dtype of its weights, in bfloat16 where all have eight bits.

        Adapters do not count, nor does what is held in float32 whatever the kernels are.
        """
        weights = jax.tree_util.tree_leaves_with_path(self.params, is_leaf=is_weight)
        dtypes = {
            leaf.dtype
            for path, leaf in weights
            if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize > 1 and last_name(path) not in KEPT
        }
        return Compute(dtype=functools.reduce(jnp.promote_types, sorted(dtypes, key=str)) if dtypes else 'bfloat16')

    def logits(
        self, tokens_BT: ArrayLike, positions_BT: ArrayLike | None = None, segment_ids_BT: ArrayLike | None = None
    ) -> jax.Array:
        """Logits [B, T, V], float32 at least, of token ids [B, T].

        Raises:
            ValueError: not two-dimensional, or an id outside the vocabulary.
        """
        tokens = jnp.asarray(tokens_BT, jnp.int32)
        if tokens.ndim != 2:
            raise ValueError(f'tokens have shape {tokens.shape}: expected [B, T]')
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
            raise ValueError(
                f'token ids from {int(tokens.min())} to {int(tokens.max())}: '
                f'expected ids from 0 to {self.config.vocab_size - 1}'
            )
        if self.config.learned_positions:
            last = tokens.shape[1] - 1 if positions_BT is None else int(jnp.max(jnp.asarray(positions_BT), initial=0))
            if last >= self.config.max_length:
                raise ValueError(f'position {last}: the model has embeddings of {self.config.max_length} positions')
        places = [None if p is None else jnp.asarray(p, jnp.int32) for p in (positions_BT, segment_ids_BT)]
        with use_mesh(self.mesh):
            return _logits(self.config, self.compute, self.params, tokens, *places)

    def generate(self, prompts: Sequence[str] | Sequence[Sequence[int]], **options: Any) -> list[GenerationResult]:
        """Continues prompts (texts or lists of token ids); see `jpt.generation.engine.generate` for the options."""
        return generate(self, prompts, **options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a jpt checkpoint."""
        save_model(path, self.config, self.params, self.assets, self.origin)

    def export(
        self,
        path: str | os.PathLike[str],
        dtype: DTypeLike | None = None,
        *,
        layout: str | None = None,
        max_shard_size: str | int = '5GB',
    ) -> None:
        """Writes a Hugging Face directory, in the dtype of the weights unless told otherwise.

        Args:
            path: the directory to make.
            dtype: cast the weights that are not quantized.
            layout: of quantized weights: 'fp8', 'modelopt' or 'compressed-tensors'; None: the first that holds them.
            max_shard_size: of the safetensors files.

        Raises:
            FileExistsError: there is something at `path`.
            ValueError: a layout that does not hold the formats of the model.
        """
        export_hf(
            path,
            self.config,
            self.params,
            source_dir=self.assets,
            origin=self.origin,
            dtype=dtype,
            max_shard_size=max_shard_size,
            layout=layout,
        )

    def __repr__(self) -> str:
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.params, is_leaf=is_weight))
        return f'Model({self.config.family}, {count:,} parameters, {self.compute.dtype})'


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(
    cfg: ModelConfig,
    compute: Compute,
    params: Any,
    tokens: jax.Array,
    positions: jax.Array | None,
    segments: jax.Array | None,
) -> jax.Array:
    logits = unembed(cfg, params, forward(cfg, params, tokens, positions, segments, compute=compute).hidden_BTD)
    return logits[..., : cfg.vocab_size]


def load(
    path: str | os.PathLike[str],
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    *,
    mtp: bool = True,
    ignore_kv_scales: bool = False,
) -> Model:
    """Opens a Hugging Face directory or a jpt checkpoint; 'quickstart' is the small teacher that jpt ships.

    Args:
        path: the directory.
        mesh: where the weights go; None: the default device.
        dtype: cast the weights; None keeps what is stored.
        mtp: keep modules that predict further tokens, where there are any; generation takes no notice of them.
        ignore_kv_scales: keep keys and values as they are computed, where the model says that they are kept in eight
            bits.

    Raises:
        FileNotFoundError: no model there.
        ValueError: a model that jpt does not compute, or weights that are not the config's.
    """
    opened = open_model(path, dtype, mtp=mtp, ignore_kv_scales=ignore_kv_scales)
    params = load_tree(opened.source) if mesh is None else _load_on(mesh, opened.source)
    return Model(opened.source.cfg, params, open_tokenizer(opened.assets), opened.assets, mesh, opened.origin)


def _load_on(mesh: Mesh, source: LeafSource) -> Any:
    """The weights on a mesh, with rows added to the vocabulary where the mesh does not divide it."""
    shapes: dict[str, Any] = {}
    for leaf in leaves_of(source):
        put(shapes, leaf.path, jax.ShapeDtypeStruct(leaf.shape, source.dtype(leaf)))
    shapes = assembled(source, shapes)
    # The layers are stacked as in a checkpoint, and `pipe` divides the stacks: its stages take turns.
    layout = make_layout(shapes, {'pipe': 1, 'tensor': mesh.shape['pipe'] * mesh.shape['tensor']})
    padded = jax.eval_shape(functools.partial(to_device_layout, layout), shapes)
    specs = param_specs(padded, Rules(mesh.shape, units_of(source.cfg)))
    params = load_tree(source, shardings(mesh, storage_specs(specs, shapes, mesh.shape)))

    def placed(leaf: Any, place: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return laid_out(to_device_layout, layout, params, jax.tree.map(placed, padded, shardings(mesh, specs)))
