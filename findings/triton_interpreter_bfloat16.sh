#!/usr/bin/env bash
# bfloat16 in Triton's interpreter, on which kernels are tested where there is no GPU.
# Guess: tl.dot multiplies numbers, and a cast to bfloat16 rounds to the nearest, as on a GPU and in torch.
# Seen: tl.dot multiplies the 16 bits as integers, so that a product is off by a factor of 1e9. A cast cuts off.
# Versions: torch 2.13.0, triton 3.7.1
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "numpy==2.3.5" "torch==2.13.0" "triton==3.7.1"

# A file: Triton reads the source of its kernels.
cat >dots.py <<'EOF'
import torch
import triton
import triton.language as tl


@triton.jit
def multiply(left, right, out):
    i = tl.arange(0, 16)
    place = i[:, None] * 16 + i[None, :]
    tl.store(out + place, tl.dot(tl.load(left + place), tl.load(right + place)))


@triton.jit
def cast(numbers, out):
    i = tl.arange(0, 16)
    tl.store(out + i, tl.load(numbers + i).to(tl.bfloat16).to(tl.float32))


def product(left, right):
    out = torch.zeros(16, 16)
    multiply[(1,)](left, right, out)
    return out


torch.manual_seed(0)
left, right = torch.randn(2, 16, 16)
right_answer = left @ right
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    found = product(left.to(dtype), right.to(dtype))
    off = float((found - right_answer).norm() / right_answer.norm())
    print(f"{dtype}: relative error of tl.dot {off:.1e}")
    assert (off > 1e6) if dtype == torch.bfloat16 else (off < 1e-2)

bits = (each.bfloat16().view(torch.uint16).long() for each in (left, right))
first, second = bits
as_integers = (first @ second).double()
found = product(left.bfloat16(), right.bfloat16()).double()
print("it is the product of the bits:", torch.allclose(found, as_integers, rtol=1e-5))
assert torch.allclose(found, as_integers, rtol=1e-5)

numbers, found = torch.randn(16), torch.zeros(16)
cast[(1,)](numbers, found)
cut_off = (numbers.view(torch.int32) & -0x10000).view(torch.float32)
print("a cast is torch's:", torch.equal(found, numbers.bfloat16().float()), " it cuts off:", torch.equal(found, cut_off))
assert torch.equal(found, cut_off) and not torch.equal(found, numbers.bfloat16().float())
EOF
TRITON_INTERPRET=1 python dots.py
