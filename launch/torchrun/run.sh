#!/usr/bin/env bash
# This host's part of launch/train.py under torchrun: hosts may die, come back and join; each change resumes the job.
set -euo pipefail
train=$(cd "$(dirname "$0")/.." && pwd)/train.py

# Or a host that joins later waits in vain for rank 0's address, which torchrun then tells in the first round only
# (torch 2.13, dynamic_rendezvous.py).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# After SIGTERM train.py finishes its step and saves; torchrun alone would kill it after 30 seconds.
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-240}
exec torchrun --nnodes "${NNODES:-2:4}" --nproc_per_node "${NPROC:-auto}" --max_restarts "${MAX_RESTARTS:-10}" \
    --rdzv_backend c10d --rdzv_endpoint "${MASTER_ADDR:?names the host that the others meet at}:${MASTER_PORT:-29500}" \
    --rdzv_id "${JOB_ID:-loft}" \
    "$train" --save_strategy steps --resume_from_checkpoint True "$@"
