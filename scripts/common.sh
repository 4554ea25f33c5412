#!/usr/bin/env bash
# What the scripts of this folder share; sourced by them.

fail() {
  echo "$(basename "$0"): $1" >&2
  exit 2
}

# Runs a command, or prints it as it would be typed.
go() {
  if [[ ${DRY_RUN:-} ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
