"""Ranks that live as long as the test session: one pool of processes and one group a world size, gloo on CPUs."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

# Importing torch and deepspeed takes 10 s; the fork server does it once for all pools. The last is what a first engine
# imports, and torch's compiler with it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "deepspeed", "transformers", "peft", "loft_ds", "deepspeed.runtime.zero.muon.muon_optimizer"]
)


class Ranks:
    """``world`` processes that run what they are told, all the same function at the same time."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._store = tempfile.NamedTemporaryFile(prefix="loft-ranks-")  # noqa: SIM115  # lives as long as the pool
        self._pipes, self._processes = [], []
        for rank in range(world):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(rank, world, self._store.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """What ``function(rank, world, *args, **kwargs)`` returns on each rank.

        Raises:
            RuntimeError: with the traceback of the first rank that failed, and which one died if one did. The pool is
                then closed: the others may be waiting in a collective.
        """
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        results: dict[int, Any] = {}
        while len(results) < self.world:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = multiprocessing.connection.wait(waiting, timeout=180)
            if not ready:
                self.close()
                raise RuntimeError(f"{function.__name__} did not end within 180 s on {len(waiting)} ranks")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    failure, results[rank] = pipe.recv()
                except EOFError:
                    failure = "its pipe is closed"
                if failure:
                    dead = self._dead()
                    self.close()
                    raise RuntimeError("\n".join([*dead, failure]))
        return [results[rank] for rank in range(self.world)]

    def _dead(self) -> list[str]:
        """Who died. Another rank's collective may fail a moment before the death itself is seen here."""
        multiprocessing.connection.wait([process.sentinel for process in self._processes], timeout=1)
        return [f"rank {rank} died" for rank, process in enumerate(self._processes) if not process.is_alive()]

    @property
    def alive(self) -> bool:
        return bool(self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []
        self._store.close()


def _serve(rank: int, world: int, store: str, pipe: multiprocessing.connection.Connection) -> None:
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # Without it DeepSpeed compiles a shared-memory collective for a minute and more.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel("ERROR")
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # Accelerate wants to see them; the group exists
    get_accelerator().set_device(rank)
    deepspeed.init_distributed(
        "gloo" if get_accelerator().device_name() == "cpu" else get_accelerator().communication_backend_name(),
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=60),
        init_method=Path(store).as_uri(),
        rank=rank,
        world_size=world,
    )
    # What has been imported stays. DeepSpeed collects garbage for every engine and LoFT looks for its own among all
    # objects: with those of torch and transformers among them either takes longer than a test's training.
    gc.freeze()
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((None, function(rank, world, *args, **kwargs)))
        except BaseException:  # the parent raises it
            pipe.send((traceback.format_exc(), None))
        unset_hf_deepspeed_config()  # a Trainer's stage 3 would shard what the next test builds
