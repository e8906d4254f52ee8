"""What LoFT knows of DeepSpeed: its JSON, its live engine, where each stage keeps its slices, what it cannot treat.

Nothing is imported here: ``python -m loft_ds.plan`` and ``python -m loft_ds.zero.unsupported`` need no DeepSpeed.
"""
