#!/usr/bin/env bash
# launch/train.py, or another PROGRAM, under Open MPI: on NPROC ranks of this host, or on all slots of a hostfile.
set -euo pipefail
program=("$(cd "$(dirname "$0")/.." && pwd)/train.py")
[ -z "${PROGRAM:-}" ] || read -ra program <<<"$PROGRAM"

# mpirun hands over only what it is told to.
exported=$(compgen -e | grep -E '^(MASTER|NCCL|GLOO|CUDA|TORCH|TRITON|HF|OMP|UCX|PYTHON|LOFT)|^(LD_LIBRARY_)?PATH$' |
    sed 's/^/-x /')
# Unbound: Open MPI would give each of two ranks one core, and torch more threads than that.
# shellcheck disable=SC2086  # two words a variable
mpirun ${HOSTFILE:+--hostfile "$HOSTFILE"} ${NPROC:+-n "$NPROC"} --bind-to none $exported \
    python -u "${program[@]}" "$@" &
mpirun=$!
# mpirun itself would give the ranks a second or two. One that gets SIGTERM saves, and with it all others.
trap 'pkill -TERM -P "$mpirun" python || kill -TERM "$mpirun"' TERM
while kill -0 "$mpirun" 2>/dev/null; do wait "$mpirun" || true; done # the trap ends a wait too
wait "$mpirun"
