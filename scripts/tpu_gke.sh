#!/usr/bin/env bash
# A training run on GKE through xpk (pip install xpk), which keeps the slice and restarts the run.
#
#   scripts/tpu_gke.sh cluster NAME TYPE           a cluster with one slice, $BUCKET at /mnt/bucket
#   scripts/tpu_gke.sh train NAME TYPE RUN FLAGS...   launch.py FLAGS on every worker
#   scripts/tpu_gke.sh list NAME                   the cluster's runs
#   scripts/tpu_gke.sh stop NAME RUN               SIGTERM: the run saves and ends
#   scripts/tpu_gke.sh delete NAME                 give everything back but the bucket
#
# TYPE: v5p-256, v6e-256, v5litepod-256, tpu7x-128, and so on. PROJECT, ZONE and BUCKET must be set
# (tpu_slice.sh bucket makes one). SLICES=N: several slices. SPOT=1: cheaper, may be taken away.
# DRY_RUN=1: print every command instead of running it.
set -euo pipefail

# shellcheck source=scripts/common.sh
source "$(dirname "$0")/common.sh"

with_xpk() {
  go xpk "$@" --project="$PROJECT" --zone="$ZONE"
}

cluster() {
  local capacity=--on-demand
  [[ ${SPOT:-} ]] && capacity=--spot
  with_xpk cluster create --cluster "$1" --tpu-type="$2" --num-slices="${SLICES:-1}" "$capacity"
  with_xpk storage attach "$BUCKET" --type=gcsfuse --cluster="$1" --bucket="$BUCKET" \
    --mount-point=/mnt/bucket --readonly=false --size=1 --auto-mount=true
}

# The image is Python alone; xpk copies this folder into it, and the container installs what is locked.
train() {
  local name=$1 type=$2 run=$3 flags
  shift 3
  flags=$(printf '%q ' "$@")
  with_xpk workload create --cluster "$name" --workload "$run" --tpu-type="$type" \
    --num-slices="${SLICES:-1}" --base-docker-image=python:3.11 --script-dir=. \
    --max-restarts=50 --restart-on-exit-codes=1,3 --termination-grace-period-seconds=300 \
    --command="pip install -q --require-hashes -r requirements-test.lock && exec python launch.py $flags"
}

[[ $# -ge 2 ]] || fail "COMMAND NAME: missing; COMMAND is cluster, train, list, stop or delete"
: "${PROJECT:?must be set: the Google Cloud project}" "${ZONE:?must be set, for example us-east5-a}"
: "${BUCKET:?must be set: the bucket for data and checkpoints}"
command=$1
shift
case $command in
  cluster) cluster "$1" "${2:?TYPE: missing, for example v5p-256}" ;;
  train)
    [[ $# -ge 4 ]] || fail "train: needs NAME TYPE RUN FLAGS..."
    train "$@"
    ;;
  list) with_xpk workload list --cluster "$1" ;;
  stop) with_xpk workload delete --cluster "$1" --workload "${2:?RUN: missing}" ;;
  delete) with_xpk cluster delete --cluster "$1" ;;
  *) fail "COMMAND $command: must be cluster, train, list, stop or delete" ;;
esac
