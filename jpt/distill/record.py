"""What a teacher says of a data set, kept: `python -m jpt.distill.record --config=configs/x.py --output=out/recorded`.

The config is that of the distillation (jpt.train), with its teacher, data, mesh and `config.record`. Every document of
config.data and config.eval.data is read once, in pieces of at most config.batch.length positions. The same command goes
on where it was stopped. `python -m jpt.train --config=configs/x.py --config.distill.targets=out/recorded` then trains
without running the teacher; see docs/record.md.
"""

import sys
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from jpt.config import from_config_dict
from jpt.sharding.multihost import join_processes
from jpt.training.settings import TrainConfig
from jpt.training.xla_flags import set_xla_flags


def define_flags() -> Any:
    """The command line; returns the holder of the config."""
    flags.DEFINE_string('output', None, 'A directory for what is recorded.', required=True)
    return config_flags.DEFINE_config_file('config', None, 'A file of configs/, with a function get_config().')


def main(argv: list[str], config: Any) -> None:
    """Reads the config, joins the other processes, and records."""
    if len(argv) > 1:
        raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
    logging.set_verbosity(logging.WARNING)  # of the libraries; what a user should see is printed
    try:
        given = from_config_dict(TrainConfig, config.value, 'config')
        if given.compute.xla_flags is not None:
            print(set_xla_flags(given.compute.xla_flags))
        join_processes(given.multihost)
        from jpt.distill.recording import record  # after the processes have met: importing models may ask for devices

        record(given, Path(flags.FLAGS.output))
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f'jpt.distill.record: {error}')


if __name__ == '__main__':
    holder = define_flags()
    flags.mark_flag_as_required('config')
    app.run(lambda argv: main(argv, holder))
