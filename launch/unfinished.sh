#!/usr/bin/env bash
# Runs a command: launch/unfinished.sh python -m ymplug_jax.main ...
# SIGTERM goes on to it, as SIGINT (Ctrl-C) does as SIGTERM, and the script waits for the save. A run that was asked to stop ends with 0, as if it were done; here it
# ends with 75, so that what restarts failed work (JobSet, tpu_vm.sh) starts it again.
set -u
stopped=
trap 'stopped=1; kill -TERM "$child" 2>/dev/null' TERM INT
"$@" &
child=$!
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do wait "$child"; done # a signal ends a wait
[ -n "$stopped" ] && { wait "$child"; code=$?; }
[ -n "$stopped" ] && [ "$code" = 0 ] && exit 75
exit "$code"
