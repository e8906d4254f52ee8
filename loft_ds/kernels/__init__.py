"""The two passes over the second moment: the reference, tiled torch, and fused for CUDA."""

from .reference import accumulate_second_moment_, normalized_update, projected_update

__all__ = ["accumulate_second_moment_", "normalized_update", "projected_update"]
