"""The main job: fine-tunes a causal language model, as ``launch/train.py`` and the command ``loft-train``."""
