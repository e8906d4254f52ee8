"""Checkpoints that survive another world size, another ZeRO stage, and a crash at any moment.

A checkpoint is a folder ``TAG`` beside a file ``latest`` that names it::

    latest                                    the tag, written last
    global_step12/manifest.json               who wrote which rows, counters, settings, a digest of every file
    global_step12/rank-00000-of-00004.safetensors
    global_step12/buffers.safetensors         where the model has persistent buffers

Every rank writes what it holds: master weights by flat interval, moments by feature rows. A reader opens the files
that overlap with what *it* holds and reads those rows only, so any number of ranks at any stage can take over and none
ever has the whole. safetensors and JSON cannot run code. (torch.distributed.checkpoint reshards as well, but its
metadata is a pickle, and no file of it says whether it arrived whole.)

All files are written beside, synced and renamed; ``latest`` moves last. A crash at any moment leaves the checkpoint
before. The folder must be one that all ranks see.
"""

from ..errors import CheckpointError
from .engine import attached
from .files import naming
from .load import last_tag, load_checkpoint
from .save import save_checkpoint

__all__ = ["CheckpointError", "attached", "last_tag", "load_checkpoint", "naming", "save_checkpoint"]
