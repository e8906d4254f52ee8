"""DeepSpeed as a job of one rank on the CPU: what the findings about ZeRO share."""

import os
import socket

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1")

import deepspeed
import torch
from deepspeed.utils import logger

# Without it DeepSpeed compiles a shared-memory collective for a minute and more.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logger.setLevel("ERROR")
deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)


def start_engine(model: torch.nn.Module, optimizer: torch.optim.Optimizer, stage: int, **config: object):
    """The engine of ``deepspeed.initialize`` with a JSON that names no more than it must."""
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        **config,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def read_weights(engine) -> dict[str, torch.Tensor]:
    """All weights as the forward pass sees them, whole."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: p.detach().float().clone() for name, p in engine.module.named_parameters()}
