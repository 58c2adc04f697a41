# Functions of dataflow.sh, flink.sh and spark.sh, which source this file.
# DRY_RUN=1 prints the command of Python instead of running it.

# Ends with exit code 2 unless all of these variables are set.
need() {
  local name
  for name in "$@"; do
    [ -n "${!name:-}" ] || { echo "error: $name is not set; set it as described at the top of $0" >&2; exit 2; }
  done
}

# Ends with exit code 2 unless these variables hold whole numbers of 1 or more.
number() {
  local name
  for name in "$@"; do
    [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || { echo "error: $name=${!name}: not a whole number of 1 or more; correct it" >&2; exit 2; }
  done
}

# Ends with exit code 2 unless the value of each of these flags is a place that all workers see. Arguments: what counts, the words.
shared() {
  local what=$1 word before='' name value
  shift
  for word in "$@"; do
    case "$word" in
      --csv=* | --video_root=* | --out=*) name=${word%%=*} value=${word#*=} ;;
      *) name=$before value=$word ;;
    esac
    before=$word
    case "$name" in --csv | --video_root | --out) ;; *) continue ;; esac
    case "$what:$value" in
      *:gs://?*/?* | any:s3://?*/?* | any:/?*) ;;
      gs:*) echo "error: $name $value: Dataflow workers cannot read it; give gs://BUCKET/FOLDER" >&2; exit 2 ;;
      *) echo "error: $name $value: workers cannot read it; give a bucket or an absolute path on a disk that all workers mount" >&2; exit 2 ;;
    esac
  done
}

# Builds the shards. Starts again after exit code 5 (a disk, a bucket or a machine failed): finished partitions stay.
build() {
  local command=("${PYTHON:-python}" -m data_prep.build_shards "$@") try code=5
  [ -z "${DRY_RUN:-}" ] || { printf '%q ' "${command[@]}"; echo; return 0; }
  for ((try = 1; try <= TRIES; try++)); do
    code=0
    "${command[@]}" || code=$?
    [ "$code" = 5 ] || return "$code"
    echo "attempt $try of $TRIES ended with exit code 5" >&2
    [ "$try" = "$TRIES" ] || sleep 60
  done
  return "$code"
}
