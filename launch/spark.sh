#!/usr/bin/env bash
# Builds shards on an Apache Spark cluster (version 3):
#   SPARK=spark://HOST:7077 IMAGE=REGISTRY/ymplug_worker \
#     launch/spark.sh --config pretrain --csv gs://BUCKET/pretrain.csv --video_root gs://BUCKET/videos --out gs://BUCKET/shards
# The executors start IMAGE (target `worker` of the Dockerfile) with Docker, or use a worker pool beside them: POOL=localhost:50000.
# The places are buckets, or folders that all workers mount under the same path. The number of executors, their cores, memory and disk,
# and the retries of a task (spark.task.maxFailures) are settings of the cluster. The driver starts Beam's job server, which needs Java;
# JAR is its file or URL, by default from Maven. DRY_RUN=1 prints the command.
set -euo pipefail
# shellcheck source=launch/cluster.sh
. "$(dirname "$0")/cluster.sh"
need SPARK
[ -n "${IMAGE:-}" ] || need POOL
SLOTS=${SLOTS:-4} # worker processes per executor: its cores
STALL_MINUTES=${STALL_MINUTES:-30}
TRIES=${TRIES:-3}
number SLOTS STALL_MINUTES TRIES
shared any "$@"
flags=(
  --runner=SparkRunner
  "--spark_master_url=$SPARK"
  --spark_version=3
  "--sdk_worker_parallelism=$SLOTS"
  "--stall_minutes=$STALL_MINUTES"
)
if [ -n "${POOL:-}" ]; then
  flags+=(--environment_type=EXTERNAL "--environment_config=$POOL")
else
  flags+=(--environment_type=DOCKER "--environment_config=$IMAGE")
fi
[ -z "${JAR:-}" ] || flags+=("--spark_job_server_jar=$JAR")
build "$@" "${flags[@]}"
