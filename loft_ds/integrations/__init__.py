"""LoFT in programs that build their Trainer by themselves, through the hooks that they offer."""
