#!/usr/bin/env bash
# One run on every host of a TPU VM slice, started again while the slice is there and the run is not done:
#   TPU=my-slice ZONE=us-central2-b launch/tpu_vm.sh --config configs/mplug_video/pretrain.py:1.3b@v5e-64 --workdir gs://BUCKET/run
# The code and a virtual environment (.venv, with the extras `tpu` and `gcs`) lie in $FOLDER on every host. A host that is taken
# away saves first; the next try goes on from its checkpoint. launch/tpu_queued.sh also makes the slice again.
set -euo pipefail
: "${TPU:?TPU is missing: the name of the slice}"
: "${ZONE:?ZONE is missing: the zone of the slice}"
FOLDER=${FOLDER:-ymplug_jax}
TRIES=${TRIES:-20}
PLACE_TRIES=${PLACE_TRIES:-5} # of which so many may end with 5: a disk, folder or bucket failed in the middle of the run
places=0
# What a lost connection has left running holds the chips: it is asked to save and end.
leftover='if [ -s run.pid ] && kill -TERM "$(cat run.pid)" 2>/dev/null; then timeout 600 tail --pid="$(cat run.pid)" -f /dev/null; fi'
run="exec bash launch/unfinished.sh .venv/bin/python -m ymplug_jax.main $(printf '%q ' "$@")"
command="cd $(printf %q "$FOLDER") && { $leftover; echo \$\$ > run.pid; $run; }"
for ((try = 1; try <= TRIES; try++)); do
  gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command="$command" && exit 0
  code=$?
  [ "$code" = 2 ] && exit 2 # a mistake in the settings does not go away
  [ "$code" = 5 ] && ((++places >= PLACE_TRIES)) && exit 5
  echo "try $try of $TRIES ended with $code" >&2
  [ "$try" = "$TRIES" ] || sleep 60
done
[ "$code" = 5 ] && exit 5
exit 1
