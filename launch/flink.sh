#!/usr/bin/env bash
# Builds shards on an Apache Flink cluster:
#   FLINK=HOST:8081 IMAGE=REGISTRY/ymplug_worker PARALLELISM=64 \
#     launch/flink.sh --config pretrain --csv gs://BUCKET/pretrain.csv --video_root gs://BUCKET/videos --out gs://BUCKET/shards
# The task managers start IMAGE (target `worker` of the Dockerfile) with Docker. Without Docker, e.g. on Kubernetes, every task manager
# has that image beside it as a worker pool, started with `--worker_pool`: give POOL=localhost:50000 instead of IMAGE.
# The places are buckets, or folders that all workers mount under the same path. The driver starts Beam's job server, which needs Java;
# JAR is its file or URL, by default that of FLINK_VERSION from Maven. DRY_RUN=1 prints the command.
set -euo pipefail
# shellcheck source=launch/cluster.sh
. "$(dirname "$0")/cluster.sh"
need FLINK PARALLELISM
[ -n "${IMAGE:-}" ] || need POOL
FLINK_VERSION=${FLINK_VERSION:-1.19}
SLOTS=${SLOTS:-4} # worker processes per task manager: its cores
RETRIES=${RETRIES:-3}
STALL_MINUTES=${STALL_MINUTES:-30}
TRIES=${TRIES:-3}
number PARALLELISM SLOTS RETRIES STALL_MINUTES TRIES
shared any "$@"
flags=(
  --runner=FlinkRunner
  "--flink_master=$FLINK"
  "--flink_version=$FLINK_VERSION"
  "--parallelism=$PARALLELISM"
  "--sdk_worker_parallelism=$SLOTS"
  "--number_of_execution_retries=$RETRIES" # of the job server: Flink restarts the job after a lost task manager
  "--stall_minutes=$STALL_MINUTES"
)
if [ -n "${POOL:-}" ]; then
  flags+=(--environment_type=EXTERNAL "--environment_config=$POOL")
else
  flags+=(--environment_type=DOCKER "--environment_config=$IMAGE")
fi
[ -z "${JAR:-}" ] || flags+=("--flink_job_server_jar=$JAR")
build "$@" "${flags[@]}"
