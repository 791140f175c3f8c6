"""Joining the processes of one job, before any device is asked for."""

import dataclasses
import os
from typing import Literal

import jax

# Variables by which JAX recognizes a launcher that tells each process its place.
LAUNCHERS = {
    'SLURM_JOB_ID': 'Slurm',
    'OMPI_MCA_orte_hnp_uri': 'Open MPI',
    'PMIX_NAMESPACE': 'Open MPI',
    'KUBERNETES_SERVICE_HOST': 'Kubernetes',
}


@dataclasses.dataclass(frozen=True)
class MultihostConfig:
    """Whether this process is one of several, how they find each other, and when a silent one ends the job.

    Under Slurm, Open MPI and Kubernetes `enabled` is all that is needed; elsewhere give the next three.
    """

    enabled: bool = False
    coordinator: str | None = None  # 'host:port' of process 0, any free port
    num_processes: int | None = None
    process_id: int | None = None
    initialization_timeout: int = 300  # seconds to wait for all processes to come
    cpu_collectives: Literal['gloo', 'mpi'] = 'gloo'  # between processes that compute on CPU
    lost_after: float = 60.0  # seconds without a sign of life until a process counts as dead or stopped
    stuck_after: float = 1800.0  # seconds without progress until a living process counts as stuck; 0: never

    def __post_init__(self) -> None:
        given = [self.coordinator is not None, self.num_processes is not None, self.process_id is not None]
        if any(given) and not all(given):
            raise ValueError(
                f'multihost.coordinator={self.coordinator!r}, num_processes={self.num_processes}, '
                f'process_id={self.process_id}: expected all three, or none where the launcher tells them'
            )
        if self.coordinator is not None and not self.coordinator.rpartition(':')[2].isdigit():
            raise ValueError(f'multihost.coordinator={self.coordinator!r}: expected host:port')
        for name in ('initialization_timeout', 'lost_after'):
            if not getattr(self, name) > 0:
                raise ValueError(f'multihost.{name}={getattr(self, name)}: expected a positive number of seconds')
        if self.stuck_after < 0:
            raise ValueError(f'multihost.stuck_after={self.stuck_after}: expected 0 or a number of seconds')


def join_processes(config: MultihostConfig) -> None:
    """Connects this process with the others of the job; nothing where `config.enabled` is False.

    Must be called before anything asks for devices. Afterwards `jax.devices()` are those of all processes.

    Raises:
        RuntimeError: devices were used already; the others did not come within `initialization_timeout`; or no launcher
            was recognized and the config does not say where process 0 is.
    """
    if not config.enabled:
        return
    launcher = next((name for variable, name in LAUNCHERS.items() if variable in os.environ), None)
    if config.coordinator is None and launcher is None:
        raise RuntimeError(
            'multihost.enabled=True, but no launcher was recognized (Slurm, Open MPI, Kubernetes): '
            'expected multihost.coordinator, num_processes and process_id'
        )
    jax.config.update('jax_cpu_collectives_implementation', config.cpu_collectives)
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            initialization_timeout=config.initialization_timeout,
            # JAX ends the job too when a process dies, with a message that does not name it: the watchdog comes first.
            heartbeat_timeout_seconds=max(100, int(2 * config.lost_after)),
        )
    except Exception as error:
        where = config.coordinator or f'the coordinator that {launcher} names'
        raise RuntimeError(
            f'this process could not join the others at {where} '
            f'within multihost.initialization_timeout={config.initialization_timeout} s: {error}'
        ) from error


def describe_process() -> str:
    """This process's place in the job, for the first line that it prints."""
    return f'process {jax.process_index()} of {jax.process_count()}, devices {jax.local_devices()}'
