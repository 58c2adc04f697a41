#!/usr/bin/env bash
#SBATCH --job-name=ymplug_jax
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
# Runs training on the nodes of a SLURM job, with one process per node that uses all its GPUs:
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh --config configs/mplug_video/pretrain.py:1.3b --workdir /shared/run
# Five minutes before the time limit SLURM sends SIGTERM to this shell (B:). The shell forwards it through srun to every process,
# the processes save a checkpoint, and the job is requeued. The job is also requeued when a node is lost (up to 20 times) and when a
# disk, folder or bucket fails (exit code 5, up to 5 times). An error in the settings (exit code 2) ends it.
set -uo pipefail
stopped=
trap 'stopped=1; kill -TERM "$step" 2>/dev/null' TERM
srun --kill-on-bad-exit=1 .venv/bin/python -m ymplug_jax.main "$@" &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; done # a signal interrupts `wait`
[ -n "$stopped" ] && { wait "$step"; code=$?; }
[ "$code" = 2 ] && exit 2
restarts=20
[ "$code" = 5 ] && restarts=5
if [ -n "$stopped" ] || { [ "$code" != 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$restarts" ]; }; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
