"""Compiles the Triton kernels to machine code: ``python compiled.py '[[17, "bfloat16", "bf16", 90]]'``.

Each case is a rank of the adapters, how the second moments are stored, the denominators' precision, and for which GPU.
A Hopper (90) must come out with its tensor cores and within its shared memory.
"""

import json
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loft_ds.kernels import fused

POINTERS = dict.fromkeys(("momentum", "keys_t", "values", "out", "gradient", "pending", "rotation"), "*fp32")
INTEGERS = dict.fromkeys(("k", "width", "columns_a_split", "size", "seed"), "i32")
TYPES = {"table": "*i64", "triangle": "*i32", **POINTERS, **INTEGERS}


def compile_kernels(rank: int, stored: str, denominators: str, capability: int) -> None:
    constants = {
        "stored": getattr(tl, stored),
        "aligned": True,
        "RANK": rank,
        "PADDED": fused._padded(rank),
        "PART": min(32, fused._padded(rank)),
        "ROWS": 64,
        "COLUMNS": 64 if rank <= 64 else 32,
        "BLOCK": 32,
        "PRECISION": "tf32x3",
        "DENOMINATORS": denominators,
        "HAS_PENDING": True,
        "HAS_ROTATION": True,
    }
    kernels = [fused._projected_update_kernel.fn]
    if rank <= fused.LARGEST_ACCUMULATED_RANK:
        kernels.append(fused._accumulate_kernel)
    for kernel in kernels:
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else TYPES.get(name, "fp32") for name in names}
        source = ASTSource(kernel, signature, {name: constants[name] for name in names if name in constants})
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
        assert compiled.asm["cubin"]
        assert "mma" in compiled.asm["ptx"]
        assert compiled.metadata.shared <= 99 * 1024  # what every GPU since 2020 has
        print("compiled", kernel.__name__, rank, stored, denominators, capability)


if __name__ == "__main__":
    for case in json.loads(sys.argv[1]):
        compile_kernels(*case)
