"""Out of memory: what takes how many bytes per device, and which settings would change that."""

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# What helps against each part, first the setting that costs least.
_REMEDIES: dict[str, str] = {
    'params': "mesh.fsdp or mesh.tensor larger; compute.param_dtype='bfloat16'; lora, or freeze",
    'optimizer': "optimizer.moments='int8' or 'bfloat16'; mesh.fsdp larger; optimizer.name='muon' (one moment); lora",
    'frozen': 'mesh.fsdp or mesh.tensor larger; a smaller teacher',
    'average': 'ema=None',
    'teacher': "teacher_mesh.fsdp or tensor larger; teacher_mesh.devices; compute.teacher_dtype='bfloat16'",
    'gradients': 'mesh.fsdp or mesh.tensor larger; lora, or freeze',
    'batch': 'batch.size smaller',
    'rest': "batch.microbatches larger; compute.remat='full'; batch.length smaller; mesh.context or mesh.tensor larger",
}


def bytes_per_device(tree: Any) -> int:
    """Bytes that one device holds of a tree of arrays or shapes with shardings (whole leaves where there is none)."""
    return sum(_leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is a device's refusal to allocate."""
    return isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' in str(error)


def memory_report(parts: Mapping[str, Any], wanted: int | None = None, limit: int | None = None) -> str:
    """A table of bytes per device by part, and what to change, beginning with the largest part.

    `parts` maps the names params, optimizer, frozen, average, teacher and batch to their trees; None trees are left
    out. `wanted` is the allocation that failed, `limit` what the device has.
    """
    sizes = {name: bytes_per_device(tree) for name, tree in parts.items() if tree is not None}
    known = sum(sizes.values())
    if limit is not None:
        sizes['rest'] = max(limit - known, 0)
    lines = [f'  {name:<10} {gib(size):>12}' for name, size in sizes.items()]
    if limit is not None:
        lines[-1] += '  left for gradients, activations and temporaries'
        lines.append(f'  {"device":<10} {gib(limit):>12}')
    if wanted is not None:
        lines.append(f'  {"asked for":<10} {gib(wanted):>12}  in one piece, which failed')
    # Gradients and activations are what fails while a step runs, unless the state alone nearly fills the device.
    state_fills = limit is not None and known > 0.7 * limit
    largest = sorted(sizes, key=lambda name: -sizes[name] if name != 'rest' else 0)
    order = largest if state_fills else ['rest', *largest]
    return '\n'.join(['out of memory; bytes per device:', *lines, *remedies(order)])


def remedies(order: Iterable[str], count: int = 3) -> list[str]:
    """Lines that say which settings help against the first parts of `order` (names as in `memory_report`, or rest)."""
    known = [name for name in dict.fromkeys(order) if name in _REMEDIES]
    return ['what to change, first things first:', *(f'  {name}: {_REMEDIES[name]}' for name in known[:count])]


@contextlib.contextmanager
def explain_out_of_memory(parts: Mapping[str, Any]) -> Iterator[None]:
    """Turns a device's refusal to allocate into a MemoryError with `memory_report` as its message."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        stats = jax.local_devices()[0].memory_stats() or {}
        raise MemoryError(memory_report(parts, wanted_bytes(str(error)), stats.get('bytes_limit'))) from error


def wanted_bytes(message: str) -> int | None:
    """The size of the failed allocation, from XLA's message ('... allocate 12.50GiB', '... 123456 bytes')."""
    found = re.search(r'allocat\w*(?: request for)?\s+([\d.]+)\s*(bytes|[KMGT]iB)', message)
    if found is None:
        return None
    return int(float(found[1]) * 1024 ** ('bytes', 'KiB', 'MiB', 'GiB', 'TiB').index(found[2]))


def gradient_bytes(params: Any, wide: bool = True) -> int:
    """Bytes that one device holds of the gradients of its parameters: as they are divided, `wide` in at least float32.

    Otherwise they have the dtypes of the parameters.
    """

    def gradient(leaf: Any) -> jax.ShapeDtypeStruct:
        dtype = jnp.promote_types(leaf.dtype, jnp.float32) if wide else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=getattr(leaf, 'sharding', None))

    return bytes_per_device(jax.tree.map(gradient, params))


def gib(size: int) -> str:
    """Bytes as text: GiB, or MiB below one."""
    return f'{size / 2**30:,.2f} GiB' if size >= 2**30 else f'{size / 2**20:,.2f} MiB'


def _leaf_bytes(leaf: Any) -> int:
    sharding = getattr(leaf, 'sharding', None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    dtype = leaf.dtype
    size = dtype.itemsize if isinstance(dtype, np.dtype) else jax.eval_shape(jax.random.key_data, leaf).size * 4
    return math.prod(shape) * size
