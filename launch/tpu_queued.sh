#!/usr/bin/env bash
# Runs training on a queued resource (spot or reserved), and requests the resource again after a preemption until the run is done:
#   TPU=my-slice ZONE=us-east5-b TYPE=v5litepod-64 RUNTIME=v2-alpha-tpuv5-lite SETUP='...' \
#     launch/tpu_queued.sh --config configs/mplug_video/pretrain.py:1.3b@v5e-64 --workdir gs://BUCKET/run
# SETUP is a shell command that installs the code and its virtual environment into $FOLDER on a new host. OPTIONS (default: --spot)
# are passed to the request, e.g. --reserved. The workdir must be a bucket (gs://), because a preemption deletes the hosts.
set -euo pipefail
for name in TPU ZONE TYPE RUNTIME SETUP; do
  [ -n "${!name:-}" ] || { echo "$name is missing; set it as described at the top of $0" >&2; exit 2; }
done
OPTIONS=${OPTIONS---spot}
TRIES=${TRIES:-1000}
PLACE_TRIES=${PLACE_TRIES:-5} # attempts that may end with exit code 5, a failed disk, folder or bucket
places=0
queued() { gcloud compute tpus queued-resources "$1" "$TPU" --zone "$ZONE" "${@:2}"; }
ready='' # 1 once SETUP has run on the hosts
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
    SUSPENDED | FAILED) # a preempted slice does not return under the same request
      ready=''
      queued delete --force --quiet || true
      continue
      ;;
    NONE)
      ready=''
      # shellcheck disable=SC2086 # OPTIONS may be several words
      queued create --node-id "$TPU" --accelerator-type "$TYPE" --runtime-version "$RUNTIME" $OPTIONS || true
      ;;
  esac
  sleep 60 # also while the request is queued, provisioned or deleted
done
echo "$TPU: the run is not done after $TRIES attempts; run the same command to continue, or set TRIES higher" >&2
exit 1
