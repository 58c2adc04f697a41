#!/usr/bin/env bash
# Builds shards on Google Cloud Dataflow:
#   PROJECT=my-project REGION=us-central1 TEMP=gs://BUCKET/tmp IMAGE=us-central1-docker.pkg.dev/my-project/images/ymplug_worker \
#     launch/dataflow.sh --config pretrain --csv gs://BUCKET/pretrain.csv --video_root gs://BUCKET/videos --out gs://BUCKET/shards
# IMAGE is the target `worker` of the Dockerfile. The driver needs the extras prep, gcs and dataflow in the versions of the image;
# simplest is to run this script in the image. DRY_RUN=1 prints the command.
# Dataflow repeats a partition of a lost worker by itself, and this script repeats a failed job. It is a batch job: no streaming engine.
set -euo pipefail
# shellcheck source=launch/cluster.sh
. "$(dirname "$0")/cluster.sh"
need PROJECT REGION TEMP IMAGE
MACHINE=${MACHINE:-n2-standard-8} # cores decode; 2 GB of memory per core are enough
DISK_GB=${DISK_GB:-100}           # a shard and a video per core, and the image
WORKERS=${WORKERS:-4}             # machines at the start
MAX_WORKERS=${MAX_WORKERS:-50}    # limit of the autoscaling
STALL_MINUTES=${STALL_MINUTES:-60}
TRIES=${TRIES:-3}
number DISK_GB WORKERS MAX_WORKERS STALL_MINUTES TRIES
shared gs "$@"
flags=(
  --runner=DataflowRunner
  "--project=$PROJECT"
  "--region=$REGION"
  "--temp_location=$TEMP"
  "--sdk_container_image=$IMAGE"
  --sdk_location=container # the image holds Beam
  "--worker_machine_type=$MACHINE"
  "--disk_size_gb=$DISK_GB"
  "--num_workers=$WORKERS"
  "--max_num_workers=$MAX_WORKERS"
  --autoscaling_algorithm=THROUGHPUT_BASED
  --number_of_worker_harness_threads=1 # a partition at a time in each process; there is a process per core
  "--stall_minutes=$STALL_MINUTES"     # includes the start of the machines
)
[ -z "${JOB:-}" ] || flags+=("--job_name=$JOB")
[ -z "${SERVICE_ACCOUNT:-}" ] || flags+=("--service_account_email=$SERVICE_ACCOUNT")
[ -z "${SUBNETWORK:-}" ] || flags+=("--subnetwork=$SUBNETWORK" --no_use_public_ips)
build "$@" "${flags[@]}"
