#!/usr/bin/env bash
# Usage: sbatch --nodes=2 scripts/slurm.sh configs/x.py out/x [more flags of jpt.train]
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail
config=$1 workdir=$2
shift 2
# One process per node, which sees all of its GPUs; SIGTERM two minutes before the end lets the job save its state.
exec srun --kill-on-bad-exit=1 python -m jpt.train --config="$config" --workdir="$workdir" \
    --config.multihost.enabled=True "$@"
