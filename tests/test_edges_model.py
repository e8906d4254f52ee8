"""Models at the edge of what is known: shared memory, compiled, starts that change frozen weights, ties, no values."""

import pytest
import torch
from models import batch, trained
from peft import LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraGAConfig, preprocess_loraga
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import loft_ds
from loft_ds import LoFTAdamW, export_adapter
from loft_ds.adapters import lost_starts

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
TIED = {"tie_word_embeddings": True}


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, **changes))


def adapted(model=None, **changes):
    model = llama() if model is None else model
    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **changes}
    return get_peft_model(model, LoraConfig(**settings))


@torch.no_grad()
def drawn(model):
    """With numbers in all that trains, as after a training."""
    for p in trained(model).values():
        p.copy_(torch.randn_like(p) * 0.1)
    return model


def ids(seed=0):
    return torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(seed))


def train(model, optimizer, steps=2):
    for step in range(steps):
        model(input_ids=ids(step), labels=ids(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def off(model, other):
    """How far the other's logits are from the model's."""
    want, got = (m.eval()(input_ids=ids(9)).logits for m in (model, other))
    return float((got - want).norm() / want.norm())


def written(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(want, got):
    return want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens", "lm_head"], ["q_proj", "lm_head"]])
def test_adapters_on_one_memory_are_refused(targets):
    """PEFT ties them by two Parameters on one storage, one of them transposed."""
    model = adapted(llama(**TIED), target_modules=targets, ensure_weight_tying=True)
    with pytest.raises(ValueError, match=r"lm_head\.lora_([AB]).* and .*embed_tokens\.lora_embedding_(?!\1)[AB]"):
        LoFTAdamW(model)


def test_memory_is_compared_by_bytes():
    """Neighbours in one storage are apart, as after DeepSpeed has flattened them; views that overlap are not."""
    model = adapted()
    params = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([p.detach().flatten() for p in params])
    for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.data = part.view(p.shape)
    LoFTAdamW(model)
    one, two = params[:2]
    two.data = flat[one.numel() - 1 :][: two.numel()].view(two.shape)
    with pytest.raises(ValueError, match=r"lie in the same memory"):
        LoFTAdamW(model)


def compiled(how):
    """A model with torch.compile around all of it, around a layer or around the base."""
    if how == "base":
        return adapted(torch.compile(llama(), backend="eager"), modules_to_save=["norm"])
    model = adapted(modules_to_save=["norm"])
    if how == "all":
        return torch.compile(model, backend="eager")
    layers = model.base_model.model.model.layers
    layers[0] = torch.compile(layers[0], backend="eager")
    return model


@pytest.mark.parametrize("how", ["all", "layer", "base"])
def test_a_compiled_model_has_the_plain_ones_names(tmp_path, how):
    plain = adapted(modules_to_save=["norm"])
    expected = LoFTAdamW(plain, lr=1e-2)
    train(plain, expected)
    plain.save_pretrained(tmp_path / "plain")
    model = compiled(how)
    optimizer = LoFTAdamW(model, lr=1e-2)
    assert list(optimizer.trainable.parameters) == list(expected.trainable.parameters)
    train(model, optimizer)
    export_adapter(optimizer, tmp_path / "compiled")
    assert same(written(tmp_path / "plain"), written(tmp_path / "compiled"))
    assert off(model, PeftModel.from_pretrained(llama(), tmp_path / "compiled")) == 0

    loft_ds.save_checkpoint(optimizer, tmp_path / "checkpoint")
    other = adapted(modules_to_save=["norm"])
    loft_ds.load_checkpoint(LoFTAdamW(other), tmp_path / "checkpoint")
    assert off(model, other) == 0


def test_buffers_of_a_compiled_model_have_the_plain_ones_names(tmp_path):
    def model():
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(7, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        return get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"], modules_to_save=["1"]))

    x, y = batch(0)
    called = torch.compile(model(), backend="eager")
    optimizer = LoFTAdamW(called, lr=1e-2)
    (called(x) - y).square().mean().backward()
    optimizer.step()
    loft_ds.save_checkpoint(optimizer, tmp_path)
    other = model()
    loft_ds.load_checkpoint(LoFTAdamW(other), tmp_path)
    assert torch.equal(called.eval()(x), other.eval()(x))


def test_an_export_of_nothing_is_never_written(tmp_path, monkeypatch):
    optimizer = LoFTAdamW(adapted())
    monkeypatch.setattr("loft_ds.export.get_peft_model_state_dict", lambda *args, **kwargs: {})
    with pytest.raises(ValueError, match="nothing to save"):
        export_adapter(optimizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_peft_does_not_save_is_said(tmp_path):
    model = adapted()
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"PEFT does not save .*model\.norm\.weight"):
        export_adapter(LoFTAdamW(model), tmp_path / "out")


def started(base, start):
    """An adapter with one of PEFT's starts."""
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "up_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=start,
        lora_ga_config=LoraGAConfig() if start == "lora_ga" else None,
        corda_config=CordaConfig() if start == "corda" else None,
    )
    torch.manual_seed(1)
    if start == "lora_ga":
        preprocess_loraga(base, config, lambda: base(input_ids=ids(), labels=ids()).loss.backward())
    if start == "corda":  # it takes batches of one sequence
        preprocess_corda(base, config, lambda: [base(input_ids=row[None]) for step in range(20) for row in ids(step)])
    model = get_peft_model(base, config)
    if start == "eva":
        initialize_lora_eva_weights(model, [{"input_ids": ids(step)} for step in range(3)])
    return model


def trained_from(start, folder):
    """Train from a start, with the start exported before: the model and its optimizer."""
    llama().save_pretrained(folder / "base")
    model = started(LlamaForCausalLM.from_pretrained(folder / "base"), start)
    optimizer = LoFTAdamW(model, lr=1e-2)
    export_adapter(optimizer, folder / "start")
    train(model, optimizer)
    torch.manual_seed(99)  # another process draws other numbers
    return model, optimizer


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva", "pissa", "olora"])
def test_starts_that_peft_finds_again(tmp_path, start):
    model, optimizer = trained_from(start, tmp_path)
    assert not lost_starts(model)
    export_adapter(optimizer, tmp_path / "out", merge=True)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert off(model, PeftModel.from_pretrained(base, tmp_path / "out")) == 0
    # Merging adds the product to the weight before the input instead of after it: a few float32 ulps.
    assert off(model, AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")) < 1e-5


@pytest.mark.filterwarnings("ignore:.*out of the frozen weights")
@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "lora_ga"])
def test_starts_that_are_lost(tmp_path, start):
    """Merging is refused before anything is written; start and end together are an adapter of the model on disk."""
    model, optimizer = trained_from(start, tmp_path)
    assert lost_starts(model) == {"default": start}
    with pytest.raises(ValueError, match=rf"start of default \({start}\)") as refused:
        export_adapter(optimizer, tmp_path / "out", merge=True)
    assert "merge_and_unload" not in str(refused.value)  # under ZeRO stage 3 there is nothing to merge into
    assert not (tmp_path / "out").exists()
    if start != "corda":  # PEFT refuses to load that one
        export_adapter(optimizer, tmp_path / "out")
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        assert off(model, PeftModel.from_pretrained(base, tmp_path / "out")) > 1e-3
    model.save_pretrained(tmp_path / "both", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert off(model, PeftModel.from_pretrained(base, tmp_path / "both")) < 1e-5


def test_merging_what_was_trained_on_quantised_weights_is_refused(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.is_quantized = True  # as transformers marks what its quantisers load
    with pytest.raises(ValueError, match=r"quantised weights.*base\.dequantize\(\)"):
        export_adapter(LoFTAdamW(adapted(base)), tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"]])
def test_merging_into_tied_weights_is_refused(tmp_path, targets):
    """PEFT would change the other layer as well."""
    llama(**TIED).save_pretrained(tmp_path / "base")
    model = adapted(LlamaForCausalLM.from_pretrained(tmp_path / "base"), target_modules=targets)
    with pytest.raises(ValueError, match=rf"{targets[1]} is another layer's too"):
        export_adapter(LoFTAdamW(model), tmp_path / "out", merge=True)


def test_a_merged_classifier_is_a_classifier(tmp_path):
    """With its labels and the head that was trained, on a base that is a language model."""
    kind = AutoModelForSequenceClassification
    llama().save_pretrained(tmp_path / "base")
    asked = {"num_labels": 3, "pad_token_id": 0, "problem_type": "multi_label_classification"}
    model = drawn(adapted(kind.from_pretrained(tmp_path / "base", **asked), task_type="SEQ_CLS"))
    export_adapter(LoFTAdamW(model), tmp_path / "out", merge=True)
    merged = kind.from_pretrained(tmp_path / "out" / "merged")
    assert off(model, merged) < 1e-5
    assert {key: getattr(merged.config, key) for key in asked} == asked


def test_a_merged_model_of_pictures_has_no_tokens(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "base")
    base = ViTForImageClassification.from_pretrained(tmp_path / "base", num_labels=5)
    model = drawn(get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", modules_to_save=["classifier"])))
    export_adapter(LoFTAdamW(model), tmp_path / "out", merge=True)
    merged = ViTForImageClassification.from_pretrained(tmp_path / "out" / "merged")
    pixels = torch.randn(2, 3, 8, 8)
    assert torch.allclose(model.eval()(pixels).logits, merged.eval()(pixels).logits, atol=1e-5)  # see off()


def test_a_merged_model_has_the_tokens_that_were_added(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.config.pad_token_id = base.config.vocab_size  # the first of them
    base.resize_token_embeddings(base.config.vocab_size + 5)
    model = drawn(adapted(base, modules_to_save=["embed_tokens", "lm_head"]))
    export_adapter(LoFTAdamW(model), tmp_path / "out", merge=True)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    assert merged.lm_head.out_features == base.config.vocab_size
    assert merged.config.pad_token_id == base.config.pad_token_id
    assert off(model, merged) < 1e-5


def test_merging_a_model_that_transformers_does_not_load_is_refused(tmp_path):
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="Sequential is no model that transformers loads"):
        export_adapter(LoFTAdamW(model), tmp_path / "out", merge=True)


def test_merging_another_adapter_than_is_loaded_is_refused(tmp_path):
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"active are \['default', 'second'\]"):
        export_adapter(LoFTAdamW(model), tmp_path / "out", merge=True)


# What PEFT saves beside the factors, and by which names.
BESIDE = {
    "tied module": (TIED, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tokens": ({}, {"trainable_token_indices": [5, 6]}),
    "tied tokens": (TIED, {"trainable_token_indices": [5, 6]}),
    "embedding": ({}, {"target_modules": ["q_proj", "embed_tokens"]}),
    "biases": ({"attention_bias": True}, {"bias": "all"}),
    "resized": ({}, {}),
}


def beside(name, folder):
    base, adapter = BESIDE[name]
    llama(**base).save_pretrained(folder / "base")
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    if name == "resized":
        torch.manual_seed(2)
        model.resize_token_embeddings(70)
    return adapted(model, **adapter)


@pytest.mark.filterwarnings("ignore:LoFT does not treat")
@pytest.mark.parametrize("name", BESIDE)
def test_an_export_is_pefts_own_save(tmp_path, name):
    model = beside(name, tmp_path)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = LoFTAdamW(model, lr=1e-2)
    train(model, optimizer)
    assert not [n for n, p in model.named_parameters() if n in before and torch.equal(p, before[n])]
    model.save_pretrained(tmp_path / "peft")
    export_adapter(optimizer, tmp_path / "ours")
    assert same(written(tmp_path / "peft"), written(tmp_path / "ours"))


def export_at(rank, world, stage, name, folder):
    import deepspeed

    model = beside(name, folder)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=LoFTAdamW(model, lr=1e-2), config=config)
    export_adapter(engine, folder / str(stage))
    engine.destroy()


@pytest.mark.parametrize("name", ["tied module", "resized"])
def test_an_export_is_whole_at_stage_3(ranks, tmp_path, name):
    """Before a step, so that nothing is rounded in another order."""
    for stage in (0, 3):
        ranks(1)(export_at, stage, name, tmp_path)
    assert all(t.numel() for t in written(tmp_path / "3").values())
    assert same(written(tmp_path / "0"), written(tmp_path / "3"))


def test_trainable_tokens_are_adamws_without_a_warning(recwarn):
    trainable = LoFTAdamW(adapted(llama(**TIED), trainable_token_indices=[5])).trainable
    assert not trainable.untreated
    assert [name for name in trainable.others if "trainable_tokens_delta" in name]
    assert not [w for w in recwarn if "AdamW moves them" in str(w.message)]


def test_frozen_adapters_have_a_remedy_of_their_own(tmp_path):
    adapted().save_pretrained(tmp_path)
    for model in (PeftModel.from_pretrained(llama(), tmp_path), adapted(inference_mode=True)):
        with pytest.raises(ValueError, match=r"frozen.*is_trainable=True.*inference_mode=False") as refused:
            LoFTAdamW(model)
        assert "get_peft_model" not in str(refused.value)
        model.set_adapter("default")
        LoFTAdamW(model)
    LoFTAdamW(PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True))


def test_adapters_without_values_are_refused():
    config = LoraConfig(r=4, target_modules=["q_proj"])
    model = get_peft_model(llama(), config, low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match=r"q_proj\.lora_A.* on the meta device.*low_cpu_mem_usage"):
        LoFTAdamW(model)
