#!/usr/bin/env bash
# The same on a queued resource (spot or reserved), which is made again whenever it was taken away, until the run is done:
#   TPU=my-slice ZONE=us-east5-b TYPE=v5litepod-64 RUNTIME=v2-alpha-tpuv5-lite SETUP='...' \
#     launch/tpu_queued.sh --config configs/mplug_video/pretrain.py:1.3b@v5e-64 --workdir gs://BUCKET/run
# SETUP is a shell command that puts the code and its virtual environment into $FOLDER of a new host. OPTIONS (default: --spot) go
# to the request, e.g. --reserved. The workdir must outlive the hosts: gs://.
set -euo pipefail
for name in TPU ZONE TYPE RUNTIME SETUP; do
  [ -n "${!name:-}" ] || { echo "$name is missing; see the head of $0" >&2; exit 2; }
done
OPTIONS=${OPTIONS---spot}
TRIES=${TRIES:-1000}
PLACE_TRIES=${PLACE_TRIES:-5} # of which so many may end with 5: a disk, folder or bucket failed in the middle of the run
places=0
queued() { gcloud compute tpus queued-resources "$1" "$TPU" --zone "$ZONE" "${@:2}"; }
ready='' # whether the hosts have the code
for ((try = 1; try <= TRIES; try++)); do
  state=$(queued describe --format='value(state.state)' 2>/dev/null || echo NONE)
  case "$state" in
    ACTIVE)
      if [ -z "$ready" ] && gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command="$SETUP"; then ready=1; fi
      if [ -n "$ready" ]; then
        TRIES=1 "$(dirname "$0")/tpu_vm.sh" "$@" && exit 0
        code=$?
        [ "$code" = 2 ] && exit 2
        [ "$code" = 5 ] && ((++places >= PLACE_TRIES)) && exit 5
      fi
      ;;
    SUSPENDED | FAILED) # a slice that was taken away does not come back under this request
      ready=''
      queued delete --force --quiet || true
      continue
      ;;
    NONE)
      ready=''
      # shellcheck disable=SC2086 # OPTIONS are several words
      queued create --node-id "$TPU" --accelerator-type "$TYPE" --runtime-version "$RUNTIME" $OPTIONS || true
      ;;
  esac
  sleep 60 # also while it waits in the queue, or is being made or taken away
done
echo "not done after $TRIES tries" >&2
exit 1
