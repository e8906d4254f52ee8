"""Will it fit, and how long will a step take: ``python -m loft_ds.plan Llama-3-8B --rank 64 --nodes 8``."""

from .division import Division, Job
from .hardware import GPUS, INTERCONNECTS, Gpu
from .memory import memory, peak
from .plan import Plan, arithmetic, plan
from .shapes import BUILTIN, Shapes, shapes_of
from .traffic import received, traffic

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
