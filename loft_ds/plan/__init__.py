"""Will it fit, and how long will a step take: ``python -m loft_ds.plan Llama-3-8B --rank 64 --nodes 8``."""

from .hardware import GPUS, INTERCONNECTS, Gpu
from .model import Division, Job, Plan, arithmetic, memory, peak, plan, received, traffic
from .shapes import BUILTIN, Shapes, shapes_of

__all__ = [
    "BUILTIN",
    "GPUS",
    "INTERCONNECTS",
    "Division",
    "Gpu",
    "Job",
    "Plan",
    "Shapes",
    "arithmetic",
    "memory",
    "peak",
    "plan",
    "received",
    "shapes_of",
    "traffic",
]
