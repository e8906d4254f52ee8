"""launch/train.py: text to blocks, every mistake in one clear line, and the real launcher once."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from launch_helpers import CONFIGS, ROOT, Hub, free_port, make_model, unlaunched, write_text
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM, TrainingArguments

from loft_ds.training import assets, checks, packing, train
from loft_ds.training.arguments import DEFAULT_STEPS, LEARNING_RATES, Optimizer, parse
from loft_ds.training.checks import LaunchError
from loft_ds.training.data import IGNORED, Encoder, blocks, read_documents, split
from loft_ds.training.logs import read_log
from loft_ds.zero.config import SettingsError, read_deepspeed_json

TRL = Path(sys.prefix) / "trl"  # `make setup` fills it
CHAT = [{"role": "user", "content": "what is red?"}, {"role": "assistant", "content": "an apple"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model):
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture
def text(tmp_path) -> Path:
    return write_text(tmp_path / "text.txt")


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if weights are loaded or a process group is about to start."""

    def refuse(*args, **kwargs):
        pytest.fail("this mistake must be found before any weights are loaded")

    monkeypatch.setattr(train.AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(train, "build", refuse)


def default_optim() -> str:
    return next(field.default for field in fields(TrainingArguments) if field.name == "optim")


# --- flags


def test_defaults_are_a_short_run_with_the_optimizer_s_own_learning_rate():
    args = parse(["--optimizer", "lora", "--deepspeed", "ds_configs/zero2.json"])
    assert args.max_steps == DEFAULT_STEPS
    assert args.learning_rate == LEARNING_RATES[Optimizer.LORA]
    assert args.output_dir == str(Path("runs", "lora-zero2"))


def test_epochs_are_not_cut_short_by_the_default_steps():
    args = parse(["--num_train_epochs", "2", "--learning_rate", "0.1"])
    assert args.max_steps == -1
    assert args.num_train_epochs == 2
    assert args.learning_rate == 0.1


def test_a_mistyped_flag_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--lora_rnak", "4"])
    assert stop.value.code != 0
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 2  # usage, then the mistake
    assert "--lora_rnak" in error[1]


# --- text


def test_a_text_file_is_one_document(text):
    assert read_documents(parse(["--train_file", str(text)])) == ([{"text": text.read_text()}], None)


def test_several_files_are_read_in_their_order(tmp_path):
    files = [tmp_path / f"{name}.txt" for name in "ba"]
    for file in files:
        file.write_text(file.stem)
    documents, _ = read_documents(parse(["--train_file", *map(str, files)]))
    assert [document["text"] for document in documents] == ["b", "a"]


def test_both_forms_of_json_lines(tmp_path, tokenizer):
    file = tmp_path / "mixed.jsonl"
    # The line separator U+2028 is legal inside a JSON string and must not end the line.
    lines = [{"text": "one\u2028two"}, {"messages": CHAT}, {"text": "  "}]
    file.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    args = parse(["--train_file", str(file), "--loss_on", "all"])
    documents, _ = read_documents(args)
    assert documents == lines[:2]
    first, second = map(Encoder(tokenizer, args), documents)
    assert tokenizer.decode(first["input_ids"]) == "one\u2028two<end>"
    assert tokenizer.decode(second["input_ids"]) == "<user>what is red?\n<assistant>an apple\n"
    assert second["labels"] == second["input_ids"]


def test_messages_need_a_chat_template(model):
    bare = AutoTokenizer.from_pretrained(model)
    bare.chat_template = None
    with pytest.raises(LaunchError, match="no chat template"):
        Encoder(bare, parse([]))({"messages": CHAT})


@pytest.fixture
def marking(tmp_path) -> str:
    """A file with a chat template that says where the assistant speaks."""
    file = tmp_path / "chat.jinja"
    file.write_text(
        "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}\n{% endgeneration %}{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
    )
    return str(file)


def test_of_a_conversation_what_the_assistant_says_is_learnt(model, marking):
    tokenizer = AutoTokenizer.from_pretrained(model)
    row = Encoder(tokenizer, parse(["--chat_template", marking]))({"messages": CHAT * 2})
    assert tokenizer.decode(row["input_ids"]) == 2 * "<user>what is red?\n<assistant>an apple\n"
    learnt = [label for label in row["labels"] if label != IGNORED]
    assert tokenizer.decode(learnt) == 2 * "an apple\n"


def test_a_template_that_does_not_mark_the_assistant_is_refused(tokenizer, monkeypatch, tmp_path):
    encode = Encoder(tokenizer, parse([]))
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(LaunchError, match=r"where the assistant speaks .*'loft_ds\[trl\]'.*--loss_on all"):
        encode({"messages": CHAT})
    with pytest.raises(LaunchError, match=r"--chat_template \S+/none: No such file"):
        Encoder(tokenizer, parse(["--chat_template", str(tmp_path / "none")]))({"messages": CHAT})


@pytest.fixture
def trl(monkeypatch):
    if not TRL.is_dir():
        pytest.skip(f"tests/trl.txt is not installed in {TRL}: run make setup")
    monkeypatch.syspath_prepend(str(TRL))
    return pytest.importorskip("trl")


def test_trl_knows_templates_that_mark_the_assistant(model, trl):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text()
    row = Encoder(tokenizer, parse([]))({"messages": CHAT})
    assert row["input_ids"] == tokenizer.apply_chat_template(CHAT)["input_ids"]
    learnt = [label for label in row["labels"] if label != IGNORED]
    assert tokenizer.decode(learnt).strip() == "an apple<|im_end|>"


def chats(path: Path, count: int = 12) -> list[str]:
    """Flags that read so many conversations of different lengths."""
    path.write_text("".join(json.dumps({"messages": CHAT * (1 + i % 3)}) + "\n" for i in range(count)))
    return ["--train_file", str(path), "--loss_on", "all", "--eval_fraction", "0.25"]


def test_a_conversation_is_a_row_of_its_own(tmp_path, tokenizer):
    args = parse([*chats(tmp_path / "chat.jsonl"), "--block_size", "64"])
    with pytest.warns(UserWarning, match=r"cut off at --block_size 64, and some are longer"):
        training, held_out, apart = split(*read_documents(args), Encoder(tokenizer, args), args)
    assert apart
    once = tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert [row["input_ids"] for row in training] == [(once * (1 + i % 3))[:64] for i in range(9)]
    assert len(held_out) == 3


@pytest.mark.filterwarnings("ignore:conversations are cut off")
def test_what_teaches_nothing_is_left_out(tmp_path, model, marking):
    tokenizer = AutoTokenizer.from_pretrained(model)
    args = parse([*chats(tmp_path / "chat.jsonl"), "--block_size", "20", "--loss_on", "assistant"])
    args.chat_template = marking  # in 20 tokens the user has not finished
    with pytest.raises(LaunchError, match="give more text"):
        split(*read_documents(args), Encoder(tokenizer, args), args)


@pytest.mark.filterwarnings("ignore:conversations are cut off")
@pytest.mark.parametrize("of", ["text", "conversations"])
def test_a_stream_holds_its_begin_out_and_loses_nothing(tmp_path, tokenizer, text, of):
    source = ["--train_file", str(text)] if of == "text" else chats(tmp_path / "chat.jsonl")
    flags = [*source, "--block_size", "64", "--max_eval_blocks", "2", "--max_steps", "1"]
    rows = {}
    for streaming in (False, True):
        args = parse([*flags, *(["--streaming"] if streaming else [])])
        training, held_out, _ = split(*read_documents(args), Encoder(tokenizer, args), args)
        rows[streaming] = [list(map(int, row["input_ids"])) for row in training]
        assert rows[streaming] == [list(map(int, row["input_ids"])) for row in training]  # the next epoch
        if streaming:
            begin = [row["input_ids"] for row in held_out]
    whole = begin + rows[True]
    assert len(begin) == 2
    assert whole[: len(rows[False])] == rows[False]
    assert len(whole) > len(rows[False])


def test_a_packed_batch_is_its_documents_one_by_one(tmp_path, model, tokenizer, trl):
    args = parse([*chats(tmp_path / "chat.jsonl"), "--block_size", "128", "--packing"])
    training, _, _ = split(*read_documents(args), Encoder(tokenizer, args), args)
    packed = packing.pack(training, args.block_size)
    assert len(packed) < len(training)
    flat = packing.Flatten()([packed[i] for i in range(len(packed))])
    network = AutoModelForCausalLM.from_pretrained(model)
    arguments = TrainingArguments("out", use_cpu=True)
    with pytest.raises(LaunchError, match=r"in a model of type llama .* sees the one before it"):
        packing.CheckApart().on_train_begin(arguments, None, None, model=network)
    network.config.use_cache = False  # as the main job has it: beside a cache Transformers makes no mask of blocks
    packing.CheckApart().on_train_begin(arguments, None, None, model=network)
    with torch.no_grad():
        loss = network(**flat).loss
        each = [network(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1) for row in training]
    after = [torch.tensor(row["input_ids"])[1:, None] for row in training]
    alone = torch.cat([-each.gather(1, ids) for each, ids in zip(each, after, strict=True)]).mean()
    torch.testing.assert_close(loss, alone, rtol=1e-6, atol=0)  # float32, other order of sums


def test_a_model_whose_documents_see_each_other_is_not_packed():
    """Bloom's attention takes positions of no kind, and says nothing where they come."""
    torch.manual_seed(0)
    network = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=300))
    with pytest.raises(LaunchError, match=r"in a model of type bloom .* sees the one before it"):
        packing.CheckApart().on_train_begin(TrainingArguments("out", use_cpu=True), None, None, model=network)


def test_a_data_set_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(3)))
    documents, _ = read_documents(parse(["--dataset_name", str(tmp_path)]))
    assert [document["text"] for document in documents] == ["line 0", "line 1", "line 2"]


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_a_data_set_has_parts(tmp_path, monkeypatch, tokenizer, streaming):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for part in ("train", "test"):
        lines = (json.dumps({"text": f"{part} {i}", "id": i}) + "\n" for i in range(9))
        (tmp_path / f"{part}.jsonl").write_text("".join(lines))
    flags = ["--dataset_name", str(tmp_path), "--eval_split", "test", "--block_size", "9", *streaming]
    args = parse([*flags, "--max_steps", "1", *([] if streaming else ["--dataset_split", "train[3:]"])])
    training, held_out, _ = split(*read_documents(args), Encoder(tokenizer, args), args)
    words = tokenizer.decode([int(i) for row in training for i in row["input_ids"]])
    assert words.startswith("train 0" if streaming else "train 3")
    assert "test" not in words
    assert tokenizer.decode(held_out[0]["input_ids"]).startswith("test 0")
    with pytest.raises(LaunchError, match=r"--dataset_name .*elsewhere"):
        read_documents(parse([*flags, "--dataset_split", "elsewhere"]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "holds no text"),
        ("blank.jsonl", "\n\n", "holds no text"),
        ("blank_text.jsonl", '{"text": " "}', "holds no text"),
        ("table.csv", "a,b", r"must end in one of \.txt, \.jsonl"),
        ("broken.jsonl", '{"text": "a"}\n{"text": ', "broken.jsonl, line 2: not JSON"),
        ("keys.jsonl", '{"txt": "a"}', "line 1: needs a string `text` or a list `messages`"),
        ("list.jsonl", '["text"]', "line 1: needs a string `text` or a list `messages`"),
        (None, None, "no such file"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message, no_weights):
    file = tmp_path / (name or "missing.txt")
    if content is not None:
        file.write_text(content)
    with pytest.raises(LaunchError, match=message):
        train.train(["--train_file", str(file)])


def test_what_leaves_nothing_to_evaluate_on_is_refused(text, tmp_path, no_weights):
    flags = ["--train_file", str(text), "--output_dir", str(tmp_path), "--max_eval_blocks", "2", "--use_cpu", "True"]
    with pytest.raises(LaunchError, match=r"drops all \d held-out blocks, less than a batch of 8"):
        train.train([*flags, "--dataloader_drop_last", "True"])


def test_an_unknown_data_set_is_named(tmp_path):
    with pytest.raises(LaunchError, match=r"--dataset_name .*nowhere"):
        read_documents(parse(["--dataset_name", str(tmp_path / "nowhere")]))


def test_two_sources_of_text_are_one_too_many(text):
    with pytest.raises(LaunchError, match="give one"):
        read_documents(parse(["--train_file", str(text), "--dataset_name", "anything"]))


def test_the_last_documents_are_held_out():
    documents = [[i] * 10 for i in range(20)]  # 200 tokens; a tenth is two documents
    training, held_out = blocks(documents, block_size=5, eval_fraction=0.1, max_eval_blocks=100)
    assert sorted({int(t) for row in held_out for t in row["input_ids"]}) == [18, 19]
    assert sorted({int(t) for row in training for t in row["input_ids"]}) == list(range(18))
    assert torch.equal(training[0]["labels"], training[0]["input_ids"])


def test_one_long_document_is_cut_and_no_token_is_in_both_parts():
    training, held_out = blocks([list(range(1003))], block_size=10, eval_fraction=0.05, max_eval_blocks=100)
    trained = {int(t) for row in training for t in row["input_ids"]}
    kept = {int(t) for row in held_out for t in row["input_ids"]}
    assert not trained & kept
    assert min(kept) > max(trained)
    assert len(kept) == 50  # 5 % of 100 blocks


def test_evaluation_is_spread_over_the_held_out_part():
    _, held_out = blocks([list(range(1000))], block_size=10, eval_fraction=0.5, max_eval_blocks=3)
    first_tokens = [int(row["input_ids"][0]) for row in held_out]
    assert first_tokens == [500, 740, 990]


def test_too_little_text_says_what_to_do():
    with pytest.raises(LaunchError, match=r"19 tokens.*--block_size below 10"):
        blocks([list(range(19))], block_size=10, eval_fraction=0.1, max_eval_blocks=1)


def test_the_default_text_holds_each_work_once():
    texts = assets.default_texts()
    assert len(texts) == 42
    hamlet = [text for text in texts if "PRINCE OF DENMARK" in text[:200].upper()]
    assert len(hamlet) == 1
    assert sum(map(len, texts)) > 5_000_000


def test_the_default_model_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("LOFT_DS_CACHE", str(tmp_path))
    made = []

    def interrupted(folder, gguf, target):
        (target / "half").touch()
        raise KeyboardInterrupt

    def dequantise(folder, gguf, target):
        assert (folder / gguf).is_file()
        (target / "config.json").touch()
        made.append(target)

    monkeypatch.setattr(assets, "_dequantise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        assets.default_model()
    assert not [entry for entry in tmp_path.iterdir() if entry.is_dir()]
    monkeypatch.setattr(assets, "_dequantise", dequantise)
    assert assets.default_model() == assets.default_model()
    assert len(made) == 1
    assert [entry.name for entry in assets.default_model().iterdir()] == ["config.json"]


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LaunchError, match=r"--no-deps -r \S+/assets.txt"):
        assets.default_texts()


# --- settings


def settings(tmp_path: Path, change=None, name: str = "zero2") -> str:
    """A copy of a shipped config, changed."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    if change:
        change(config)
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config))
    return str(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(gradient_cliping=1.0), "unknown key 'gradient_cliping'; did you mean 'gradient_clipping'?"),
        (
            lambda c: c["zero_optimization"].update(stge=1),
            "unknown key 'stge' in zero_optimization; did you mean 'stage'?",
        ),
        (
            lambda c: c["zero_optimization"].update(offload_optimizer={"devise": "cpu"}),
            "unknown key 'devise' in zero_optimization.offload_optimizer; did you mean 'device'?",
        ),
        (
            lambda c: c["zero_optimization"].update(offload_param={"device": "cpu", "pin_memry": True}),
            "unknown key 'pin_memry' in zero_optimization.offload_param; did you mean 'pin_memory'?",
        ),
        (lambda c: c["bf16"].update(enable=True), "unknown key 'enable' in bf16; did you mean 'enabled'?"),
        (
            lambda c: c.update(tensorboard={"enable": True}),
            "unknown key 'enable' in tensorboard; did you mean 'enabled'?",
        ),
        (lambda c: c["zero_optimization"].update(stage=4), "'zero_optimization.stage': Input should be"),
        (lambda c: c.update(zero_optimization=True), "'zero_optimization' must hold settings, not True"),
        (lambda c: c.update(bf16=True), "'bf16' must hold settings, not True"),
        (
            lambda c: c["bf16"].update(enabled=True),
            "bf16.enabled=True, but the flags say bf16|bf16_full_eval=False; let",
        ),
        (lambda c: c.update(gradient_clipping=0.5), "gradient_clipping=0.5, but the flags say max_grad_norm=1.0; let"),
        (lambda c: c.update(elasticity={}), "Elastic training has been removed"),
        (lambda c: c.update(optimizer={"type": "AdamW"}), "'optimizer' would train in place of LoFT"),
        (lambda c: c.pop("zero_allow_untested_optimizer"), 'needs "zero_allow_untested_optimizer": true'),
        (
            lambda c: c["zero_optimization"].update(offload_optimizer={"device": "cpu"}),
            'needs "zero_force_ds_cpu_optimizer": false',
        ),
    ],
)
def test_a_bad_setting_is_named(tmp_path, text, change, message, no_weights):
    path = settings(tmp_path, change)
    with pytest.raises(SettingsError) as error:
        train.train(["--deepspeed", path, "--train_file", str(text)])
    assert "\n" not in str(error.value)
    assert error.match(message.replace("?", r"\?").replace("|", r"\|"))
    assert str(error.value).startswith(path)


def test_all_that_is_wrong_is_said_at_once(tmp_path, text, no_weights):
    def spoil(config):
        config["zero_optimization"].update(stge=1, reduce_bucket_size="many", offload_optimizer={"devise": "cpu"})
        config.update(_comment="no mistake", communication_data_type="fp12", elasticity={}, gradient_cliping=1.0)
        config.update(optimizer={"type": "AdamW"}, bf16={"enabled": True, "x": 1})
        del config["zero_allow_untested_optimizer"]

    path = settings(tmp_path, spoil)
    with pytest.raises(SettingsError) as error:
        train.train(["--deepspeed", path, "--train_file", str(text)])
    lines = str(error.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    said = [
        *("'zero_optimization.reduce_bucket_size': Input", "'devise' in zero_optimization.offload_optimizer; did you"),
        *("'stge' in zero_optimization; did you mean 'stage'?", "'x' in bf16", "Got: fp12", "'elasticity'"),
        *("did you mean 'gradient_clipping'?", "bf16.enabled=True, but", "'optimizer' would train in place of LoFT"),
        '"zero_allow_untested_optimizer": true',
    ]
    assert [word for word in said if sum(word in line for line in lines) != 1] == []
    assert len(lines) == len(said)


def test_the_settings_of_one_section_may_need_another(tmp_path):
    """As DeepSpeed gets one after the other."""
    path = settings(tmp_path, lambda c: c.update(bf16={"enabled": True, "bf16_master_weights_and_grads": True}))
    assert read_deepspeed_json(path)["bf16"]["enabled"]
    both = settings(tmp_path, lambda c: c.update(bf16={"enabled": True}, fp16={"enabled": True}))
    with pytest.raises(SettingsError, match=r"^\S+: bfloat16 and fp16 modes cannot be simultaneously enabled$"):
        read_deepspeed_json(both)


def test_keys_that_deepspeed_ignores_are_a_warning(tmp_path):
    path = settings(tmp_path, lambda c: c.update(_comment="for the cluster", comms_config={"verbose": True}))
    with pytest.warns(UserWarning, match=rf"^{path}: DeepSpeed ignores '_comment', 'comms_config'$"):
        assert read_deepspeed_json(path)["_comment"] == "for the cluster"


@pytest.mark.parametrize("form", ["compute_environment: LOCAL_MACHINE\nnum_machines: 1", '{"distributed_type": "NO"}'])
def test_a_configuration_of_accelerates_is_called_so(tmp_path, form, no_weights):
    file = tmp_path / "accelerate"
    file.write_text(form)
    with pytest.raises(SettingsError, match=r"a configuration of Accelerate's.*`accelerate launch --config_file`"):
        train.train(["--deepspeed", str(file)])


def test_the_json_of_accelerate_launch_is_read_as_the_flags(tmp_path, text, monkeypatch, no_weights):
    path = settings(tmp_path, lambda c: c["bf16"].update(enabled=True))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", path)
    assert parse([]).deepspeed is None
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert parse(["--deepspeed", "other.json"]).deepspeed == "other.json"
    with pytest.raises(SettingsError, match=rf"^{path}: bf16\.enabled=True, but the flags say"):
        train.train(["--train_file", str(text)])


def test_batch_sizes_are_the_trainer_s_to_check(tmp_path):
    path = settings(tmp_path, lambda c: c.update(train_batch_size=48, gradient_accumulation_steps=3))
    assert read_deepspeed_json(path)["train_batch_size"] == 48


def test_an_optimizer_in_the_settings_is_fine_where_it_is_wanted(tmp_path, text, model, no_weights):
    path = settings(tmp_path, lambda c: c.update(optimizer={"type": "AdamW", "params": {"lr": "auto"}}))
    with pytest.raises(LaunchError, match="--lora_rank 33"):  # it got past the settings
        train.train(
            [
                *("--deepspeed", path, "--train_file", str(text), "--model_name_or_path", str(model)),
                *("--optimizer", "lora", "--lora_rank", "33"),
            ]
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ('{"bf16": }', "line 1 column 10"),
        ("[]", "one JSON object"),
        ('{"a":1,"a":2}', "Duplicate"),
    ],
)
def test_a_bad_settings_file_is_named(tmp_path, content, message, no_weights):
    file = tmp_path / "ds.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError, match=message) as error:
        train.train(["--deepspeed", str(file)])
    assert str(file) in str(error.value)


# --- model


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_rank", "33"], r"--lora_rank 33 is larger than the layer model\.layers\.0\.self_attn\.q_proj \(32 in"),
        (["--lora_rank", "17"], r"--lora_rank 17 .*k_proj \(32 inputs, 16 outputs\)"),
        (["--lora_rank", "0"], "`r`"),
        (["--target_modules", "c_attn"], "Target modules .*c_attn.* not found"),
        (["--block_size", "100000"], "give more text or a --block_size below 100000"),
        (["--eval_fraction", "1.5"], "must lie between 0 and 1"),
        (["--target_parameters", "mlp.experts.up"], r"--target_parameters mlp\.experts\.up: the model has no such"),
        (["--modules_to_save", "head"], r"--modules_to_save head: the model has no such"),
        (["--optimizer", "lora", "--offload_second_moment"], "LoFT's: --optimizer lora"),
        (
            ["--optimizer", "lora", "--head_learning_rate", "0", "--modules_to_save", "lm_head"],
            "LoFT's: --optimizer lora",
        ),
        (["--head_learning_rate", "1e-2"], "nothing trains outside the adapters; name it by --modules_to_save"),
        (["--optimizer", "full", "--modules_to_save", "lm_head"], "the adapters': --optimizer full has none"),
        (["--optimizer", "full", "--target_modules", "q_proj"], "the adapters': --optimizer full has none"),
        (["--optimizer", "full", "--load_in_8bit"], "the adapters': --optimizer full has none"),
        (["--bnb_4bit_use_double_quant"], "--bnb_4bit_use_double_quant is of --load_in_4bit, which is not given"),
        (["--eval_split", "test"], "--eval_split is of --dataset_name, which is not given"),
        (["--streaming", "--num_train_epochs", "1"], "say --max_steps"),
        (["--init_lora_weights", "eva"], "--init_lora_weights eva: it is to be true, gaussian"),
        (["--init_lora_weights", "orthogonal", "--lora_rank", "3"], "rank"),
        (["--optimizer", "full", "--use_rslora"], "the adapters': --optimizer full has none"),
        (["--report_to", "nobody"], "--report_to nobody: it is not installed"),
        (["--push_to_hub"], "--push_to_hub needs a token: `hf auth login`, or HF_TOKEN"),
        (["--load_in_4bit", "--load_in_8bit"], "--load_in_4bit and --load_in_8bit: choose one"),
        (["--load_in_4bit"], r"--load_in_4bit needs bitsandbytes: pip install 'loft_ds\[quantised\]'"),
        (["--optim", "adafactor"], "--optim is another optimizer's: --optimizer loft would drop it"),
        (["--optim_target_modules", "q_proj"], "--optim_target_modules is another optimizer's"),
    ],
)
def test_a_model_that_cannot_take_the_adapters_is_refused(model, text, flags, message, no_weights, monkeypatch):
    monkeypatch.setattr(checks, "get_token", lambda: None)
    with pytest.raises(LaunchError, match=message) as error:
        train.train(["--model_name_or_path", str(model), "--train_file", str(text), *flags])
    assert "\n" not in str(error.value)


def test_an_unknown_model_is_named(tmp_path, text, no_weights):
    with pytest.raises(LaunchError, match=r"--model_name_or_path .*no-model"):
        train.train(["--model_name_or_path", str(tmp_path / "no-model"), "--train_file", str(text)])


def test_deepspeed_without_a_launcher_names_one(model, text, monkeypatch, no_weights):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)  # MPI would be another launcher
    flags = ["--deepspeed", str(CONFIGS / "zero2.json"), "--train_file", str(text)]
    with pytest.raises(LaunchError, match="deepspeed --num_accelerators 1"):
        train.train([*flags, "--model_name_or_path", str(model)])


def test_a_mistake_ends_the_process_with_one_line_and_no_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--deepspeed", str(tmp_path / "missing.json")])
    monkeypatch.setattr(train, "prepare_process", lambda: None)  # it would change this process's logging and threads
    with pytest.raises(SystemExit) as stop:
        train.main()
    # A string as the code: Python prints it on stderr and exits with status 1.
    assert stop.value.code == f"train.py: error: {tmp_path}/missing.json: no such file"


def test_several_mistakes_are_a_line_each(tmp_path, monkeypatch):
    path = settings(tmp_path, lambda c: c.update(gradient_cliping=1.0, zero_optimisation={}))
    monkeypatch.setattr(sys, "argv", ["train.py", "--deepspeed", path])
    monkeypatch.setattr(train, "prepare_process", lambda: None)
    with pytest.raises(SystemExit) as stop:
        train.main()
    lines = stop.value.code.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"train.py: error: {path}: unknown key") for line in lines)


def test_flags_that_do_not_go_together_are_one_line(model, text):
    with pytest.raises(SettingsError, match=r"^At most one of fp16 and bf16 can be True"):
        train.train(["--model_name_or_path", str(model), "--train_file", str(text), "--use_cpu", "--fp16", "--bf16"])


def test_packing_without_trl_names_it(model, text, monkeypatch, no_weights):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LaunchError, match=r"--packing needs TRL: pip install 'loft_ds\[trl\]'"):
        train.train(["--model_name_or_path", str(model), "--train_file", str(text), "--packing"])


def test_peft_s_starts_reach_peft(model, text, monkeypatch, no_weights):
    seen = []
    monkeypatch.setattr(train, "check_adapters", lambda config, lora: seen.append(lora))
    for flags in ([], ["--init_lora_weights", "pissa_niter_4", "--use_rslora"]):
        with pytest.raises(pytest.fail.Exception):  # weights would be loaded
            train.train(["--model_name_or_path", str(model), "--train_file", str(text), "--use_cpu", *flags])
    assert [(lora.init_lora_weights, lora.use_rslora) for lora in seen] == [(True, False), ("pissa_niter_4", True)]


def test_offload_reaches_the_optimizer(model, text, monkeypatch):
    class ReachedError(Exception):
        pass

    def reach(**kwargs):
        raise ReachedError(kwargs["loft_kwargs"])

    monkeypatch.setattr(train, "LoggedTrainer", reach)
    flags = ["--model_name_or_path", str(model), "--train_file", str(text), "--use_cpu"]
    for given, expected in [([], False), (["--offload_second_moment"], True)]:
        with pytest.raises(ReachedError) as reached:
            train.train([*flags, *given])
        assert reached.value.args == ({"offload_second_moment": expected},)


# --- all of it


def test_a_head_under_accelerate_launch(tmp_path, model, text):
    """With a learning rate of its own, under the settings of Accelerate's own fields."""
    out, file = tmp_path / "out", tmp_path / "accelerate.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_machines: 1\nnum_processes: 1\n"
        "use_cpu: true\nmixed_precision: 'no'\ndeepspeed_config: {zero_stage: 3, zero3_init_flag: true}\n"
    )
    command = [
        *(str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", str(file)),
        *("--main_process_port", str(free_port()), "launch/train.py", "--optim", default_optim()),
        *("--model_name_or_path", str(model), "--train_file", str(text), "--max_steps", "2", "--block_size", "32"),
        *(
            "--lora_rank",
            "4",
            "--learning_rate",
            "1e-2",
            "--head_learning_rate",
            "1e-3",
            "--lr_scheduler_type",
            "constant",
        ),
        *("--modules_to_save", "lm_head", "--save_steps", "2", "--save_strategy", "steps"),
        *("--output_dir", str(out), "--report_to", "none"),
    ]
    result = subprocess.run(command, cwd=ROOT, env=unlaunched(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["deepspeed"], metrics["zero_stage"]) == ("accelerate launch", 3)
    assert metrics["head_learning_rate"] == 1e-3
    # AdamW's first steps are of the size of the learning rate, whatever the gradient.
    moved = load_file(out / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    moved = moved - load_file(model / "model.safetensors")["lm_head.weight"]
    assert 1.5e-3 < moved.abs().max() < 2.1e-3


@pytest.mark.rehearse
def test_conversations_streamed_packed_and_pushed(tmp_path, model, marking, trl):
    """On two ranks at stage 3, where the adapter has to be gathered, and where every rank reads the whole stream."""
    out, hub = tmp_path / "out", Hub()
    learnt = [*chats(tmp_path / "chat.jsonl", 40), "--loss_on", "assistant", "--chat_template", marking]
    command = [
        *(str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"),
        *("--master_port", str(free_port()), "launch/train.py", "--deepspeed", "ds_configs/zero3.json"),
        *("--model_name_or_path", str(model), *learnt, "--streaming", "--packing", "--block_size", "128"),
        *("--max_steps", "4", "--lora_rank", "4", "--learning_rate", "1e-2", "--init_lora_weights", "olora"),
        *("--output_dir", str(out), "--push_to_hub", "--hub_model_id", "somebody/run"),
        *("--save_strategy", "steps", "--save_steps", "2"),
    ]
    online = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_nobody", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    environment = {**unlaunched(TRL), **online}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    hub.shutdown()
    hub.server_close()
    assert result.returncode == 0, result.stdout + result.stderr
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"]
    # A push may be left out while the one before it is under way.
    assert [message for message, _ in hub.commits][:: len(hub.commits) - 1] == [
        "Training in progress, step 2",
        "End of training",
    ]
    for _, pushed in hub.commits:
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "log.jsonl"} <= pushed.keys()
        assert not [path for path in pushed if path.startswith(("_", "."))]
    for name in ("adapter_model.safetensors", "metrics.json", "loss.png", "README.md"):
        assert pushed[name] == (out / name).read_bytes()


def test_the_launcher_trains_and_leaves_a_report_and_an_adapter(tmp_path, model, text):
    out = tmp_path / "out"
    command = [
        *(str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"),
        *("--master_port", str(free_port())),  # not the usual one: other jobs may run here
        *("--enable_each_rank_log", str(tmp_path / "ranks"), "launch/train.py"),
        *("--deepspeed", "ds_configs/zero2.json", "--model_name_or_path", str(model), "--train_file", str(text)),
        *("--max_steps", "6", "--block_size", "32", "--lora_rank", "4", "--learning_rate", "1e-2"),
        *("--output_dir", str(out), "--report_to", "tensorboard"),
    ]
    result = subprocess.run(command, cwd=ROOT, env=unlaunched(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    first, second = (file.read_text() for file in sorted((tmp_path / "ranks").iterdir()))
    assert first.count("Held-out loss") == 1
    # DeepSpeed says this one while it is imported.
    assert [line for line in second.splitlines() if "Setting accelerator to CPU" not in line] == []

    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["optimizer"] == "loft"
    assert (metrics["deepspeed"], metrics["zero_stage"]) == ("ds_configs/zero2.json", 2)
    assert metrics["world_size"] == 2
    assert metrics["steps"] == 6
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"]
    log = [entry for entry in read_log(out) if "loss" in entry]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    for entry in log:
        assert entry["grad_norm"] > 0
        assert 0 < entry["optimizer_share"] < 1
        # Two ranks with two sequences of 32 tokens each.
        assert entry["tokens_per_second"] * entry["step_time"] == pytest.approx(2 * 2 * 32)
    shown = EventAccumulator(str(next(out.glob("runs/*")))).Reload()
    for key in ("loss", "grad_norm", "step_time", "tokens_per_second", "optimizer_share"):
        scalars = shown.Scalars(f"train/{key}")
        # TensorBoard keeps float32.
        assert [(s.step, s.value) for s in scalars] == [(e["step"], pytest.approx(e[key], rel=1e-6)) for e in log]
    assert not (out / "_ranks").exists()
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")

    weights = load_file(out / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) == metrics["trainable_parameters"]
    assert all(tensor.abs().max() > 0 for tensor in weights.values())  # PEFT starts B at 0: it has moved
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), out)
    ids = torch.arange(8)[None]
    expected = adapted(ids).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)  # float32, other order of sums
