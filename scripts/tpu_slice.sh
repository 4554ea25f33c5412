#!/usr/bin/env bash
# A Cloud TPU slice from nothing to a training run: docs/tpu.md tells the story.
#
#   scripts/tpu_slice.sh bucket                    make gs://$BUCKET, for data and checkpoints
#   scripts/tpu_slice.sh create NAME TYPE          ask for a slice and wait until it is there
#   scripts/tpu_slice.sh install NAME              this commit and its environment on every worker
#   scripts/tpu_slice.sh mount NAME                $BUCKET as /mnt/bucket on every worker
#   scripts/tpu_slice.sh train NAME FLAGS...       launch.py FLAGS on every worker, in the background
#   scripts/tpu_slice.sh log NAME                  follow the first worker's log
#   scripts/tpu_slice.sh run NAME COMMAND          one shell command on every worker
#   scripts/tpu_slice.sh stop NAME                 SIGTERM: the run saves and ends
#   scripts/tpu_slice.sh delete NAME               give the slice back
#
# TYPE: v5p-256 (4x4x8 chips), v5litepod-256 (16x16), v6e-256 (16x16), and so on.
# PROJECT and ZONE must be set; BUCKET for bucket and mount. SPOT=1: cheaper, may be taken away.
# DRY_RUN=1: print every command instead of running it.
set -euo pipefail

# shellcheck source=scripts/common.sh
source "$(dirname "$0")/common.sh"

tpus() {
  go gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"
}

everywhere() {
  tpus tpu-vm ssh "$1" --worker=all --command="$2"
}

runtime_of() {
  case $1 in
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "TYPE $1: must be v5p-N, v5litepod-N or v6e-N (tpu7x is rented through GKE: tpu_gke.sh)" ;;
  esac
}

make_bucket() {
  # Checkpoints become valid by renaming a folder: that is atomic only with a hierarchical namespace.
  go gcloud storage buckets create "gs://${BUCKET:?is not set}" --project="$PROJECT" \
    --location="${ZONE%-*}" --uniform-bucket-level-access --enable-hierarchical-namespace
}

create() {
  local name=$1 type=$2 runtime state spot=()
  runtime=$(runtime_of "$type")
  [[ ${SPOT:-} ]] && spot=(--spot)
  tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$runtime" "${spot[@]}"
  while true; do
    state=$(tpus queued-resources describe "$name" --format='value(state.state)')
    echo "$state"
    [[ ${DRY_RUN:-} || $state == ACTIVE ]] && return
    [[ $state == FAILED || $state == SUSPEND* ]] && fail "$name is $state; delete it and ask again"
    sleep 30
  done
}

install() {
  local archive
  archive=$(mktemp --suffix=.tar.gz)
  go git archive --format=tar.gz --prefix=engram_jax/ --output="$archive" HEAD
  tpus tpu-vm scp "$archive" "$1:engram_jax.tar.gz" --worker=all
  # The slice's own Python is older than JAX allows; uv brings one.
  everywhere "$1" "tar -xzf engram_jax.tar.gz && cd engram_jax && \
python3 -m pip install --user -q uv && \
~/.local/bin/uv venv -q --clear --seed --python 3.11 .venv && \
.venv/bin/pip install -q --require-hashes -r requirements-test.lock && \
.venv/bin/pip install -q --no-deps --no-build-isolation -e ."
  rm -f "$archive"
}

mount_bucket() {
  everywhere "$1" "command -v gcsfuse > /dev/null || { echo 'install gcsfuse first' >&2; exit 1; }; \
mountpoint -q /mnt/bucket || { sudo mkdir -p /mnt/bucket && sudo chown \$USER /mnt/bucket && \
gcsfuse --implicit-dirs ${BUCKET:?is not set} /mnt/bucket; }"
}

train() {
  local name=$1 flags
  shift
  flags=$(printf '%q ' "$@")
  everywhere "$name" "cd engram_jax && \
{ nohup .venv/bin/python launch.py $flags > train.log 2>&1 < /dev/null & } && sleep 1"
}

[[ $# -ge 1 ]] || fail "COMMAND: missing; bucket, create, install, mount, train, log, run, stop or delete"
: "${PROJECT:?must be set: the Google Cloud project}" "${ZONE:?must be set, for example us-east5-a}"
command=$1
shift
[[ $command == bucket || $# -ge 1 ]] || fail "NAME: missing"
case $command in
  bucket) make_bucket ;;
  create) create "$1" "${2:?TYPE: missing, for example v5p-256}" ;;
  install) install "$1" ;;
  mount) mount_bucket "$1" ;;
  train) train "$@" ;;
  log) tpus tpu-vm ssh "$1" --worker=0 --command='tail -n 50 -f engram_jax/train.log' ;;
  run) everywhere "$1" "${2:?COMMAND: missing}" ;;
  stop) everywhere "$1" "pkill -TERM -f 'python launch[.]py'" ;;
  delete) tpus queued-resources delete "$1" --force --quiet ;;
  *) fail "COMMAND $command: must be bucket, create, install, mount, train, log, run, stop or delete" ;;
esac
