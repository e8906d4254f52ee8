#!/usr/bin/env bash
# PEFT on mixture-of-experts models of transformers 5, which keeps the experts of a layer in one 3-D parameter.
# Guess: target_modules gate_proj, up_proj, down_proj adapts every MLP of the model, or its linear layers, at rank r.
# Seen: DeepSeek-V3: routed experts alone, at rank 2r, none in shared experts and dense layers. Qwen2-MoE: the reverse.
# Versions: torch 2.13.0, transformers 5.23.0, peft 0.21.2
set -euo pipefail
. "$(dirname "$0")/lib.sh"
make_env "torch==2.13.0" "transformers==5.23.0" "peft==0.21.2"

python - <<'EOF'
import torch
import transformers
from peft import LoraConfig, get_peft_model

R, EXPERTS = 4, 4
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=4, num_experts_per_tok=2)  # fmt: skip
# Of both the first layer is dense; the second has routed experts and a shared one.
models = {
    "DeepseekV3": dict(n_routed_experts=EXPERTS, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1,
                       q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8),
    "Qwen2Moe": dict(num_experts=EXPERTS, shared_expert_intermediate_size=24, mlp_only_layers=[0]),
}  # fmt: skip


def find_adapters(name, targets):
    """The ranks of the adapters in each kind of MLP, by layer."""
    config = getattr(transformers, f"{name}Config")(**sizes, **models[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".mlp." in n]
    assert any("shared" in n for n in linear) and any("layers.0.mlp.gate_proj" in n for n in linear)
    found = {"dense": set(), "shared": set(), "routed": set(), "router": set()}
    for key, p in get_peft_model(model, LoraConfig(r=R, target_modules=targets)).named_parameters():
        if "lora_A" in key and ".mlp." in key:
            kind = "routed" if "experts.base_layer" in key or "mlp.experts" in key else "shared"
            kind = "dense" if "layers.0" in key else "router" if "mlp.gate.lora" in key else kind
            found[kind].add(p.shape[0] // EXPERTS if kind == "routed" else p.shape[0])
    return found


for targets in (["gate_proj", "up_proj", "down_proj"], "all-linear"):
    for name in models:
        found = find_adapters(name, targets)
        print(f"r={R}, {name}, {targets}: ranks {found}")
        if name == "DeepseekV3":
            # gate and up are one parameter, so the adapter of both gets twice the rank that was asked for.
            router = {R} if targets == "all-linear" else set()
            assert found == {"dense": set(), "shared": set(), "routed": {R, 2 * R}, "router": router}
        else:
            assert found == {"dense": {R}, "shared": {R}, "routed": set(), "router": set()}
EOF
