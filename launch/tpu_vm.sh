#!/usr/bin/env bash
# One run on every host of a TPU VM slice, started again while the slice is there and the run is not done:
#   TPU=my-slice ZONE=us-central2-b launch/tpu_vm.sh --config configs/mplug_video/pretrain.py:1.3b@v5e-64 --workdir gs://BUCKET/run
# The code and a virtual environment (.venv, with the extra `tpu`) lie in $FOLDER on every host. A host that is taken away saves
# first; the next try goes on from its checkpoint.
set -euo pipefail
: "${TPU:?TPU is missing: the name of the slice}"
: "${ZONE:?ZONE is missing: the zone of the slice}"
FOLDER=${FOLDER:-ymplug_jax}
TRIES=${TRIES:-20}
command="cd $(printf %q "$FOLDER") && .venv/bin/python -m ymplug_jax.main $(printf '%q ' "$@")"
for ((try = 1; try <= TRIES; try++)); do
  gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command="$command" && exit 0
  code=$?
  [ "$code" = 2 ] && exit 2 # a mistake in the settings does not go away
  echo "try $try of $TRIES ended with $code; again in 60 s" >&2
  sleep 60
done
exit 1
