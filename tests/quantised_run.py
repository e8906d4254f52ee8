"""Trains on quantised bases and on the same weights dequantised.

Started by test_quantised.py, because the packages are no part of the tests' own environment: tests/quantised.txt.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from ranks import Ranks
from scaling import TINY
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    QuantoConfig,
    TorchAoConfig,
    TrainingArguments,
)

from loft_ds import LoFTAdamW, LoFTTrainer
from loft_ds.quantised import keep_gradients

BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
ZERO = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 2},
}


def load(folder: str, kind: str) -> PeftModel:
    """The model of a folder on a quantised base, with adapters."""
    settings: Any = None
    if kind in BITSANDBYTES:
        settings = BitsAndBytesConfig(**BITSANDBYTES[kind])
    elif kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        settings = TorchAoConfig(Int8WeightOnlyConfig())
    elif kind == "quanto":
        settings = QuantoConfig(weights="int8")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings)
    if kind == "hqq":  # transformers 5.23 does not load by HqqConfig
        quantise_by_hqq(model)
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def quantise_by_hqq(model: nn.Module) -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, nn.Linear):
                    config = BaseQuantizeConfig(nbits=4, group_size=64)
                    setattr(block, name, HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu"))


def dequantised(folder: str, model: PeftModel) -> PeftModel:
    """The same adapters on plain layers that hold the quantised ones' weights."""
    plain = load(folder, "none")
    layers = dict(model.named_modules())
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(("lora_A.default", "lora_B.default")):
            layer = layers[name]
            weight = layer.dequantize() if hasattr(layer, "W_q") else dequantize_module_weight(layer)
            module.weight.data = weight.float().reshape(module.weight.shape).clone()
    return plain


def ids(step: int) -> Tensor:
    return torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(step))


def train(model: PeftModel, stage: int | None, rank: int, world: int, kind: str) -> Tensor:
    """All products B @ A after three steps; without DeepSpeed where there is no stage."""
    import deepspeed

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = LoFTAdamW(model, lr=1e-3) if kind == "loft" else AdamW(trained.values(), lr=1e-3, weight_decay=0)
    if stage is None:
        engine: Any = model
    else:
        config = {**ZERO, "zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 4 // world}
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(3):
        tokens = ids(step).chunk(world)[rank]
        loss = engine(input_ids=tokens, labels=tokens).loss
        if stage is None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            engine.backward(loss)
            engine.step()
    with deepspeed.zero.GatheredParameters(list(trained.values()), enabled=stage == 3):
        pairs = [(trained[name.replace("lora_A", "lora_B")], a) for name, a in trained.items() if "lora_A" in name]
        return torch.cat([(b @ a).detach().flatten() for b, a in pairs])


def compare(rank: int, world: int, folder: str, kind: str, stage: int | None, optimizer: str = "loft") -> float:
    """The distance of all products from those of the run on the dequantised base, relative to their length."""
    model = load(folder, kind)
    keep_gradients(model)
    wanted, got = (train(each, stage, rank, world, optimizer) for each in (dequantised(folder, model), model))
    return float((got - wanted).norm() / wanted.norm())


def bytes_of_base(rank: int, world: int, folder: str, kind: str, stage: int) -> int:
    """What the frozen weights take on this rank, with all that bitsandbytes keeps beside them."""
    import deepspeed

    model = load(folder, kind)
    keep_gradients(model)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 1000}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=LoFTAdamW(model), config={**ZERO, "zero_optimization": zero}
    )
    engine(input_ids=ids(0)[:2], labels=ids(0)[:2])  # int8 takes its scales at the first pass
    engine.empty_partition_cache()
    kept: list[Tensor] = []
    for p in model.parameters():
        if not p.requires_grad:
            kept += [p.data, getattr(p, "ds_tensor", p.data)]
            state = getattr(p, "quant_state", None)
            for each in (state, getattr(state, "state2", None)):
                kept += [t for t in vars(each).values() if isinstance(t, Tensor)] if each is not None else []
    kept += [m.state.SCB for m in model.modules() if hasattr(m, "state") and m.state.SCB is not None]
    sizes = {t.data_ptr(): t.numel() * t.element_size() for t in kept if t.numel()}
    return sum(sizes.values())


def evaluate_first(rank: int, world: int, folder: str, careful: bool) -> str:
    """What a step says after an evaluation before the optimizer is built, where bitsandbytes packs its weights."""
    model = load(folder, "nf4")
    if careful:
        keep_gradients(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=ids(0))
    model.train()
    optimizer = LoFTAdamW(model)
    with torch.no_grad():
        model.eval()(input_ids=ids(0))  # from now on it packs nothing
    model.train()
    model(input_ids=ids(0), labels=ids(0)).loss.backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "stepped"


def under_a_trainer(rank: int, world: int, folder: str, kind: str) -> str:
    model = load(folder, kind)
    with tempfile.TemporaryDirectory() as out:
        args = TrainingArguments(out, deepspeed=ZERO, per_device_train_batch_size=2, report_to="none", use_cpu=True)
        trainer = LoFTTrainer(model, args, train_dataset=[{"input_ids": ids(0)[0], "labels": ids(0)[0]}] * 8)
        try:
            trainer.train()
        except NotImplementedError as error:
            return str(error)
    return "trained"


def main() -> None:
    """Prints all outcomes as one JSON object."""
    from bitsandbytes.nn.modules import has_avx512bf16

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    out: dict[str, Any] = {"packs": has_avx512bf16()}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes)).save_pretrained(folder)
        alone, two = Ranks(1), Ranks(2)
        for kind in (*BITSANDBYTES, "hqq"):
            for stage in (0, 2, 3):
                out[f"{kind} {stage}"] = two(compare, folder, kind, stage)[0]
        larger = f"{folder}/larger"
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY)).save_pretrained(larger)
        for kind in ("nf4", "nf4 twice", "int8"):
            for stage in (0, 3):
                out[f"{kind} {stage} bytes"] = two(bytes_of_base, larger, kind, stage)
        out["int8 AdamW"] = alone(compare, folder, "int8", None, "adamw")[0]
        for kind in ("torchao", "quanto"):
            out[f"{kind} plain"] = alone(compare, folder, kind, None)[0]
            out[f"{kind} under a Trainer"] = alone(under_a_trainer, folder, kind)[0]
        for careful in (False, True):
            out["evaluated " + ("carefully" if careful else "first")] = alone(evaluate_first, folder, careful)[0]
        alone.close()
        two.close()
    print(json.dumps(out))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
