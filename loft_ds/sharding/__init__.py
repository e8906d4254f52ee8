"""Who owns which feature rows under each ZeRO stage, and the exchange between them."""

from .layout import Layout, Rows, Share, Slice, Whole, compute_dtype

__all__ = ["Layout", "Rows", "Share", "Slice", "Whole", "compute_dtype"]
