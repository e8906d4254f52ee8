"""Fine-tunes a causal language model with LoFT on the Hugging Face Trainer, with DeepSpeed or without.

    deepspeed --num_accelerators 2 launch/train.py --deepspeed ds_configs/zero2.json   # two processes on a CPU
    deepspeed launch/train.py --deepspeed ds_configs/zero2.json                        # every GPU of the machine
    python launch/train.py                                                             # one process, no DeepSpeed

The job itself is ``loft_ds.training``.
"""

from loft_ds.training.__main__ import main

if __name__ == "__main__":
    main()
