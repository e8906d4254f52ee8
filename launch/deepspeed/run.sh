#!/usr/bin/env bash
# launch/train.py on all hosts of a hostfile: by pdsh over ssh or, where NODE_RANK is set, this host's part without ssh.
set -euo pipefail
train=$(cd "$(dirname "$0")/.." && pwd)/train.py
hostfile=${HOSTFILE:?names a file with a line \"host slots=8\" for each host}

# The launcher would otherwise ask the first host over ssh, and take whichever of its addresses comes first.
hosts=$(awk '!/^[[:space:]]*(#|$)/ { print $1 }' "$hostfile")
address=${MASTER_ADDR:-${hosts%%[[:space:]]*}} port=${MASTER_PORT:-29500}
options=(--hostfile "$hostfile" --master_addr "$address" --master_port "$port")
if [ -n "${NODE_RANK:-}" ] || [ "$(wc -l <<<"$hosts")" = 1 ]; then
    options+=(--no_ssh --node_rank "${NODE_RANK:-0}")
fi
deepspeed "${options[@]}" "$train" "$@" &
runner=$!
# The launcher's two parts, of which the one here leaves its child alone and the other kills the ranks after 30 seconds,
# are passed by: a rank that gets SIGTERM saves, and with it all others.
launch="^[^ ]+ -u -m deepspeed\.launcher\.launch .*--master_addr=$address --master_port=$port "
trap 'pkill -TERM -P "$(pgrep -d, -f "$launch")" || kill -TERM "$runner"' TERM
while kill -0 "$runner" 2>/dev/null; do wait "$runner" || true; done # the trap ends a wait too
wait "$runner"
