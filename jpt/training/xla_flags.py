"""Presets of XLA's GPU flags, chosen by name in a config.

All of them are accepted by the jaxlib of jax 0.10.2 and 0.12 (a test); an unknown flag would abort the process, which
is why nothing is set unless asked for. What they do is from JAX's GPU performance tips and from GPU_performance.md of
JAX-Toolbox.
"""

import os
from collections.abc import MutableMapping

from jax._src import xla_bridge  # jax has no public way to ask whether its backends have started

_OVERLAP = (
    '--xla_gpu_enable_latency_hiding_scheduler=true',  # collectives run while products do
    '--xla_gpu_enable_command_buffer=',  # command buffers off: captured graphs keep collectives from overlapping
    '--xla_gpu_enable_pipelined_all_gather=true',
    '--xla_gpu_enable_pipelined_reduce_scatter=true',
    '--xla_gpu_enable_pipelined_all_reduce=true',
    '--xla_gpu_enable_while_loop_double_buffering=true',
)

_FSDP = (
    *_OVERLAP,
    '--xla_gpu_all_gather_combine_threshold_bytes=1073741824',
    '--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728',
    '--xla_gpu_all_reduce_combine_threshold_bytes=1073741824',
)

PRESETS: dict[str, tuple[str, ...]] = {
    # One node or one GPU: overlap only.
    'overlap': _OVERLAP,
    # Parameters sharded over fsdp: gathers and scatters of a whole layer become one message.
    'fsdp': _FSDP,
    # Training in FP8 with a scale per tensor: XLA's Triton products, which are none in FP8 on Hopper, leave them to
    # cuBLASLt. With the flags of 'fsdp', which do nothing on one GPU.
    'fp8': (*_FSDP, '--xla_gpu_enable_triton_gemm=false'),
    # Pipeline stages: sends and receives are hoisted over the work of the other microbatches.
    'pipeline': (
        *_OVERLAP,
        '--xla_gpu_experimental_pipeline_parallelism_opt_level=PIPELINE_PARALLELISM_OPT_LEVEL_ENABLE',
        '--xla_gpu_enable_pipelined_p2p=true',
        '--xla_disable_hlo_passes=collective-permute-motion',
    ),
    # Bit-equal reruns on the same GPUs, slower. The autotune cache must be kept too, see docs.
    'deterministic': ('--xla_gpu_deterministic_ops=true',),
}


def set_xla_flags(preset: str | None, environment: MutableMapping[str, str] = os.environ) -> str:
    """Adds a preset to XLA_FLAGS and returns a line to print. Flags that the user has set keep their values.

    Raises:
        ValueError: an unknown preset.
        RuntimeError: the backend has started, which reads the flags only once.
    """
    if preset is None:
        return f'XLA flags: {environment.get("XLA_FLAGS") or "none"}'
    if preset not in PRESETS:
        raise ValueError(f'compute.xla_flags={preset!r}: expected None or one of {", ".join(PRESETS)}')
    if xla_bridge.backends_are_initialized():
        raise RuntimeError(f'compute.xla_flags={preset!r} comes too late: JAX has started its backend already')
    given = environment.get('XLA_FLAGS', '').split()
    taken = {flag.split('=')[0] for flag in given}
    environment['XLA_FLAGS'] = ' '.join(
        [*given, *(flag for flag in PRESETS[preset] if flag.split('=')[0] not in taken)]
    )
    return f'XLA flags ({preset}): {environment["XLA_FLAGS"]}'
