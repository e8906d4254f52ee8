#!/usr/bin/env bash
# launch/train.py on all hosts of a hostfile: by pdsh over ssh or, where NODE_RANK is set, this host's part without ssh.
set -euo pipefail
train=$(cd "$(dirname "$0")/.." && pwd)/train.py
hostfile=${HOSTFILE:?names a file with a line \"host slots=8\" for each host}

# The launcher would otherwise ask the first host over ssh, and take whichever of its addresses comes first.
first_host=$(awk '!/^[[:space:]]*(#|$)/ { print $1; exit }' "$hostfile")
options=(--hostfile "$hostfile" --master_addr "${MASTER_ADDR:-$first_host}" --master_port "${MASTER_PORT:-29500}")
if [ -n "${NODE_RANK:-}" ]; then
    options+=(--no_ssh --node_rank "$NODE_RANK")
fi
exec deepspeed "${options[@]}" "$train" "$@"
