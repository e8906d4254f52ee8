#!/usr/bin/env bash
# PEFT: two adapters on one model, named "0" and "1", as one numbers folds, seeds or clients; or one named "mlp".
# Guess: an adapter's name is free, and has no say in how another adapter is saved.
# Seen: saving one drops, without a word, each layer whose path contains the other's name: "layers.1." for "1".
# Versions: torch 2.13.0, transformers 5.23.0, peft 0.21.2
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "transformers==5.23.0" "peft==0.21.2"

python - <<'EOF'
import warnings

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(3))


def save(first, second):
    """What of the adapter named first is in the file that save_pretrained writes, while second is there too."""
    config = LoraConfig(r=2, target_modules=["attn", "mlp"])
    model = get_peft_model(Model(), config, adapter_name=first)
    model.add_adapter(second, config)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model.save_pretrained("out", selected_adapters=[first])
    assert not [w for w in warned if "adapter" in str(w.message).lower()]
    keys = load_file(f"out/{'' if first == 'default' else first + '/'}adapter_model.safetensors")
    return {".".join(key.split(".")[3:5]) for key in keys}


everything = {f"{i}.{part}" for i in range(3) for part in ("attn", "mlp")}
for first, second in (("a", "b"), ("0", "1"), ("1", "0"), ("default", "mlp")):
    lost = everything - save(first, second)
    print(f"saved {first!r} beside {second!r}: lost {sorted(lost) or 'nothing'}")
    assert lost == {layer for layer in everything if second in layer.split(".")}
EOF
