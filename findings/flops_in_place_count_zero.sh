#!/usr/bin/env bash
# torch.utils.flop_counter.FlopCounterMode over products that write into a tensor that is there already.
# Guess: x.addmm_(a, b) counts as torch.addmm(x, a, b) does.
# Seen: the in-place forms count 0, and so do addbmm and all products with a vector; out= forms count in full.
# Versions: torch 2.13.0
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "numpy==2.4.6" "torch==2.13.0"

python - <<'EOF'
import torch
from torch.utils.flop_counter import FlopCounterMode

a, b, x = torch.randn(8, 16, 32), torch.randn(8, 32, 24), torch.zeros(8, 16, 24)
one = 2 * 16 * 32 * 24  # a multiplication and an addition for each entry
work = {
    "addmm": (lambda: torch.addmm(x[0], a[0], b[0]), one),
    "mm(out=)": (lambda: torch.mm(a[0], b[0], out=torch.empty(16, 24)), one),
    "baddbmm": (lambda: torch.baddbmm(x, a, b), 8 * one),
    "addmm_": (lambda: x[0].addmm_(a[0], b[0]), one),
    "baddbmm_": (lambda: x.baddbmm_(a, b), 8 * one),
    "addbmm": (lambda: torch.addbmm(x[0], a, b), 8 * one),
    "matrix @ vector": (lambda: a[0] @ b[0, :, 0], 2 * 16 * 32),
    "stack @ vector": (lambda: a @ b[0, :, 0], 8 * 2 * 16 * 32),
}
print(f"{'operation':>16} {'done':>8} {'counted':>8}")
for name, (run, done) in work.items():
    with FlopCounterMode(display=False) as counter:
        run()
    counted = counter.get_total_flops()
    print(f"{name:>16} {done:8} {counted:8}")
    assert counted == (done if name in ("addmm", "mm(out=)", "baddbmm") else 0)
EOF
