#!/usr/bin/env bash
#SBATCH --job-name=ymplug_jax
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=TERM@120
# One run over the nodes of a SLURM job, one process a node:
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh --config configs/mplug_video/pretrain.py:1.3b --workdir /shared/run
# Two minutes before the time limit every process saves; the job is queued again and goes on.
set -euo pipefail
trap 'scontrol requeue "$SLURM_JOB_ID"' TERM
srun --kill-on-bad-exit=1 .venv/bin/python -m ymplug_jax.main "$@" &
wait $!
