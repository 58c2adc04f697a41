#!/usr/bin/env bash
# Runs a training command so that a scheduler restarts it after a preemption: launch/unfinished.sh python -m ymplug_jax.main ...
# The script forwards SIGTERM, and SIGINT (Ctrl-C) as SIGTERM, and waits until the run has saved a checkpoint. A run that was asked to
# stop exits with 0, like a finished one. This script then exits with 75, so that JobSet and tpu_vm.sh start it again.
set -u
stopped=
trap 'stopped=1; kill -TERM "$child" 2>/dev/null' TERM INT
"$@" &
child=$!
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do wait "$child"; done # a signal interrupts `wait`
[ -n "$stopped" ] && { wait "$child"; code=$?; }
[ -n "$stopped" ] && [ "$code" = 0 ] && exit 75
exit "$code"
