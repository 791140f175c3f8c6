"""GPUs that are not here: topologies to compile for, on a machine without any (extra `aot`)."""

import importlib.util
from typing import Any, NamedTuple

import jax


class Chip(NamedTuple):
    """One kind of GPU, from its data sheet."""

    name: str
    memory: int  # bytes of device memory
    bfloat16: float  # dense operations per second
    bandwidth: float  # bytes per second of device memory
    link: float  # bytes per second to the other GPUs of a node, in one direction


H100 = Chip('NVIDIA H100 80GB HBM3', 84_942_979_072, 989.4e12, 3.352e12, 450e9)
H200 = Chip('NVIDIA H200', 150_754_820_096, 989.4e12, 4.8e12, 450e9)
CHIPS = {'h100': H100, 'h200': H200}
PLUGINS = ('jax_cuda13_plugin', 'jax_cuda12_plugin')
GPUS_PER_HOST = 8


def target_config(chip: Chip) -> str:
    """The text proto (xla.gpu.GpuTargetConfigProto) that tells XLA what it compiles for.

    Without runtime_version XLA leaves out what needs to know the toolkit, such as FP8 products in cuBLASLt.
    """
    limits = {
        'threads_per_block_limit': 1024,
        'threads_per_warp': 32,
        'shared_memory_per_block': 49_152,
        'shared_memory_per_core': 233_472,
        'shared_memory_per_block_optin': 232_448,
        'threads_per_core_limit': 2048,
        'core_count': 132,
        'fpus_per_core': 128,
        'block_dim_limit_x': 2_147_483_647,
        'block_dim_limit_y': 65_535,
        'block_dim_limit_z': 65_535,
        'thread_dim_limit_x': 1024,
        'thread_dim_limit_y': 1024,
        'thread_dim_limit_z': 64,
        'registers_per_core_limit': 65_536,
        'registers_per_block_limit': 65_536,
        'l2_cache_size': 52_428_800,
        'memory_bandwidth': int(chip.bandwidth),
        'device_memory_size': chip.memory,
        'clock_rate_ghz': 1.98,
        'device_address_bits': 64,
    }
    names = {
        'device_vendor': 'NVIDIA Corporation',
        'name': chip.name,
        'driver_version': '13.0.0',
        'runtime_version': '12.8.0',
        'compile_time_toolkit_version': '12.8.0',
        'dnn_version': '9.10.0',
    }
    info = ' '.join(f'{key}: {value}' for key, value in limits.items())
    info += ' ' + ' '.join(f'{key}: "{value}"' for key, value in names.items())
    info += ' cuda_compute_capability { major: 9 minor: 0 }'
    versions = 'dnn_version_info { major: 9 minor: 10 patch: 0 }'
    return f'gpu_device_info {{ {info} }} platform_name: "CUDA" {versions} device_description_str: "{chip.name}"'


def topology_devices(count: int, chip: Chip = H100) -> list[Any]:
    """Devices of `count` GPUs, eight to a host, for `make_mesh`; nothing can run on them, but programs compile.

    Raises:
        RuntimeError: the CUDA plugin is not installed.
        ValueError: a count that is not 1 to 8 or a multiple of 8.
    """
    if not any(importlib.util.find_spec(name) for name in PLUGINS):
        raise RuntimeError("compiling for GPUs without one needs their plugin: pip install -e '.[aot]'")
    if count < 1 or (count > GPUS_PER_HOST and count % GPUS_PER_HOST):
        raise ValueError(f'topology={count}: expected 1 to {GPUS_PER_HOST} GPUs, or a multiple of {GPUS_PER_HOST}')
    from jax.experimental import topologies

    jax.devices()  # the host's own backend must have started
    hosts, local = max(1, count // GPUS_PER_HOST), min(count, GPUS_PER_HOST)
    description = topologies.get_topology_desc(
        platform='cuda', target_config=target_config(chip), topology=f'{hosts}x1x{local}'
    )
    return list(description.devices)
