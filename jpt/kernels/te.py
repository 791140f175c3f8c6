"""Products in FP8 by Transformer Engine for JAX, an optional backend: one scale per tensor, found at every step.

Of its recipes for JAX only those with one scale per tensor are for Hopper. It has none of 1 x 128 and 128 x 128 blocks
on any GPU (`Float8BlockScaling` is an unsupported type there), and MXFP8 asks for compute capability 9.9 at least: what
is blockwise, jpt's own kernels do. Written after its sources (2.20); it was not run with them yet. What stands against
it is said before a step is compiled.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import jax.numpy as jnp
from jax.sharding import AxisType

from jpt.kernels.local import mesh_axes

NO_BLOCKS = (
    'Transformer Engine has for JAX no recipe of blocks (1 x 128, 128 x 128) on any GPU, and MXFP8 only from compute '
    'capability 9.9 on'
)


def require() -> None:
    """Imports Transformer Engine.

    Raises:
      ImportError: it is not there, or not for JAX, or one of NVIDIA's libraries is missing; says what to install.
    """
    _module('dense')
    _without_meshes()


@functools.cache
def _without_meshes():
    """Tells Transformer Engine once that no mesh is divided; it asks when it is traced and when it is lowered, so the
    context that says so stays open until the process ends."""
    sharding = _module('sharding')
    context = sharding.global_shard_guard(sharding.MeshResource())
    context.__enter__()
    return context


def tensor_dot(x, weight_OI):
    """x [..., in] times a weight [out, in]: [..., out] in x's dtype; both gradients are Transformer Engine's.

    Weight and x are rounded to E4M3, the gradient of the result to E5M2, with scales of the arrays as they are
    (Float8CurrentScaling). Its products take weights as [in, out].

    Raises:
      ImportError: as `require`.
      ValueError: on a mesh, of which Transformer Engine would have to be told.
    """
    sizes = mesh_axes(AxisType.Auto) | mesh_axes(AxisType.Manual)
    if sizes:
        raise ValueError(f"gradients='te' on a mesh {sizes}: expected one device, or gradients='tensor'")
    _without_meshes()
    recipe = importlib.import_module('transformer_engine.common.recipe').Float8CurrentScaling()
    quantizers = _module('quantize').QuantizerFactory.create_set(fp8_recipe=recipe)
    contract = (x.ndim - 1,), (0,)
    weight_IO = jnp.swapaxes(weight_OI, 0, 1).astype(x.dtype)
    return _module('dense').dense(x, weight_IO, contracting_dims=contract, quantizer_set=quantizers).astype(x.dtype)


def _module(name: str) -> ModuleType:
    """A module of transformer_engine.jax.

    Raises:
      ImportError: as `require`.
    """
    try:
        return importlib.import_module(f'transformer_engine.jax.{name}')
    except (ImportError, RuntimeError, OSError) as error:  # of absent libraries it raises RuntimeError and OSError
        raise ImportError(
            "gradients='te' needs Transformer Engine for JAX on an NVIDIA GPU: pip install 'jpt[te]' "
            f"--no-build-isolation; gradients='tensor' does the same products by XLA. {NO_BLOCKS}: gradients='block' "
            f'is what jpt has for them. ({type(error).__name__}: {error})'
        ) from error
