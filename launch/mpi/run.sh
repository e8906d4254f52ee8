#!/usr/bin/env bash
# launch/train.py under Open MPI: on NPROC ranks of this host, or on all slots of a hostfile.
set -euo pipefail
train=$(cd "$(dirname "$0")/.." && pwd)/train.py

# mpirun hands over only what it is told to.
exported=$(compgen -e | grep -E '^(MASTER|NCCL|GLOO|HF|OMP|UCX|PYTHON|LOFT)|^PATH$' | sed 's/^/-x /')
# Unbound: Open MPI would give each of two ranks one core, and torch more threads than that.
# shellcheck disable=SC2086  # two words a variable
exec mpirun ${HOSTFILE:+--hostfile "$HOSTFILE"} ${NPROC:+-n "$NPROC"} --bind-to none $exported \
    python -u "$train" "$@"
