"""Every training job: `python -m jpt.train --config=configs/quickstart.py --workdir=out/quickstart`.

The way to the line that computes the loss: `run_job` in training/run.py; `make_job` in training/job.py, which chooses
the objective, `language_modeling` in training/objective.py or `logit_distillation` in distill/objective.py; its `last`,
which calls `linear_loss` in kernels/head_loss.py with a token loss of kernels/token_losses.py. The loop is
training/loop.py.
"""

import sys
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from jpt.config import from_config_dict
from jpt.sharding.multihost import describe_process, join_processes
from jpt.training.settings import TrainConfig
from jpt.training.xla_flags import set_xla_flags

CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/, with a function get_config().')
WORKDIR = flags.DEFINE_string('workdir', None, 'Checkpoints, metrics and results; out/<name of the config> by default.')


def main(argv: list[str]) -> None:
    """Reads the config, joins the other processes, and runs the job."""
    if len(argv) > 1:
        raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
    logging.set_verbosity(logging.WARNING)  # of the libraries; what a user should see is printed
    name = Path(config_flags.get_config_filename(flags.FLAGS['config'])).stem
    workdir = Path(WORKDIR.value or f'out/{name}')
    try:
        run(from_config_dict(TrainConfig, CONFIG.value, 'config'), workdir)
    except (ValueError, FileNotFoundError, FloatingPointError, MemoryError) as error:
        sys.exit(f'jpt.train: {error}')


def run(config: TrainConfig, workdir: Path) -> Any:
    """Runs one job in a folder of its own and returns the trained model; see `jpt.training.run`."""
    if config.compute.xla_flags is not None:
        print(set_xla_flags(config.compute.xla_flags))
    join_processes(config.multihost)
    from jpt.training.run import run_job  # after the processes have met: importing models may ask for devices

    workdir.mkdir(parents=True, exist_ok=True)
    jax.config.update('jax_compilation_cache_dir', str((workdir / 'compilation_cache').absolute()))
    if jax.process_count() > 1:
        print(describe_process(), flush=True)
    return run_job(config, workdir)


if __name__ == '__main__':
    flags.mark_flag_as_required('config')
    app.run(main)
