"""Before a long job: is every node as the others, do they reach each other, does LoFT step right, will the job fit?"""

from .command import main
from .findings import Finding

__all__ = ["Finding", "main"]
