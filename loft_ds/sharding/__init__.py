"""Who owns which feature rows under each ZeRO stage, and the exchange between them."""

from .layout import HALF_A_PAIR, Layout, Rows, Share, Slice, Whole, compute_dtype

__all__ = ["HALF_A_PAIR", "Layout", "Rows", "Share", "Slice", "Whole", "compute_dtype"]
