"""Where kernels that are written for Hopper's own instructions (wgmma, the copy engine) can run, and on what."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jpt.kernels.local import platform

# The generation, by the names of its GPUs.
HOPPER = ('H100', 'H200', 'H800', 'H20')


def reason_not_hopper() -> str | None:
    """Why a kernel for Hopper cannot run where the traced program will, or None where it can."""
    if platform() != 'gpu':
        return f'the platform is {platform()}, not gpu'
    device = getattr(jax.sharding.get_abstract_mesh(), 'abstract_device', None) or jax.devices()[0]
    if not any(name in device.device_kind for name in HOPPER):
        return f'the device is {device.device_kind}, not of the Hopper generation'
    return None


def multiprocessors(interpret: Any = None) -> int:
    """How many blocks of a kernel can each have a multiprocessor of their own; two in the interpreter."""
    if interpret is not None:
        return 2
    described = getattr(jax.sharding.get_abstract_mesh(), 'abstract_device', None)
    return described.num_cores if described else jax.devices()[0].core_count


def swizzle_of(width: int, dtype: Any) -> int:
    """Bytes of the longest line of shared memory, of those that swizzling knows, that divides a row; 0 for none.

    The copy engine takes arrays as tiles of 8 rows and such a line.
    """
    row = width * jnp.dtype(dtype).itemsize
    return next((line for line in (128, 64, 32) if row % line == 0), 0)


def swizzled(width: int, dtype: Any) -> tuple[Any, ...]:
    """How a tile of an array with rows of this width lies in shared memory, for the copy engine and tensor cores."""
    from jax.experimental.pallas import mosaic_gpu as plgpu  # Pallas: not loaded where it is not used

    line = swizzle_of(width, dtype)
    return plgpu.TilingTransform((8, line // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(line)
