#!/usr/bin/env bash
# Runs training on every host of a TPU VM slice, and restarts it until the run is done:
#   TPU=my-slice ZONE=us-central2-b launch/tpu_vm.sh --config configs/mplug_video/pretrain.py:1.3b@v5e-64 --workdir gs://BUCKET/run
# $FOLDER on every host holds the code and a virtual environment (.venv, with the extras `tpu` and `gcs`). A host saves a checkpoint
# before it is preempted, and the next attempt resumes from it. launch/tpu_queued.sh also creates the slice again.
set -euo pipefail
: "${TPU:?not set; set it to the name of the slice}"
: "${ZONE:?not set; set it to the zone of the slice}"
FOLDER=${FOLDER:-ymplug_jax}
TRIES=${TRIES:-20}
PLACE_TRIES=${PLACE_TRIES:-5} # attempts that may end with exit code 5, a failed disk, folder or bucket
places=0
# A process left over from a lost connection holds the chips. It is asked to save and exit.
leftover='if [ -s run.pid ] && kill -TERM "$(cat run.pid)" 2>/dev/null; then timeout 600 tail --pid="$(cat run.pid)" -f /dev/null; fi'
run="exec bash launch/unfinished.sh .venv/bin/python -m ymplug_jax.main $(printf '%q ' "$@")"
command="cd $(printf %q "$FOLDER") && { $leftover; echo \$\$ > run.pid; $run; }"
for ((try = 1; try <= TRIES; try++)); do
  gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command="$command" && exit 0
  code=$?
  [ "$code" = 2 ] && exit 2 # an error in the settings, which a restart does not fix
  [ "$code" = 5 ] && ((++places >= PLACE_TRIES)) && exit 5
  echo "attempt $try of $TRIES ended with exit code $code" >&2
  [ "$try" = "$TRIES" ] || sleep 60
done
[ "$code" = 5 ] && exit 5
exit 1
