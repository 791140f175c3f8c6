#!/bin/bash
# Trains on several nodes: sbatch --nodes=4 scripts/slurm.sh CONFIG WORKDIR [FLAGS...]
#SBATCH --job-name=jpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
#SBATCH --output=jpt-%j.log

set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: sbatch [--nodes=N] $0 CONFIG WORKDIR [FLAGS...]" >&2
  exit 2
fi
config=$1
workdir=$2
shift 2

# Proxies can keep the processes from finding each other.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY

# One process per GPU. SIGTERM five minutes before the end lets the loop save; when one process ends badly, Slurm ends
# the others, stopped ones included.
status=0
srun --kill-on-bad-exit=1 --label python -m jpt.train --config="$config" --workdir="$workdir" \
  --config.multihost.enabled=True "$@" || status=$?

# Whatever ended the job, it goes on from its last checkpoint: start it again, on other nodes if Slurm likes, at most
# three times. (srun returns the highest code of all processes, so the watchdog's 75 is hidden by the others' ends.)
if [ "$status" -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
