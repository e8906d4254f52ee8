"""Checkpoints: bitwise on the same ranks, equal on any others, all or nothing at any crash, and nothing but data."""

import functools
import json
import os
import pickle
import shutil
import signal
import sys

import pytest
import torch
from launch_helpers import fill_disk
from models import Bomb, batch, odd_model, relative, train_alone, trained, two_groups
from ranks import CONTEXT
from safetensors.torch import load_file
from sharded_run import gathered, start_engine, train_engine

import loft_ds
from loft_ds import Blocks, CheckpointError, LoFTAdamW
from loft_ds.checkpoint.files import digest, read_json, write_json
from loft_ds.checkpoint.manifest import PAIR_STATE

STEPS = 8


def own(engine, folder):
    loft_ds.save_checkpoint(engine, folder)


def deepspeeds(engine, folder):
    engine.save_checkpoint(folder)


def run(
    rank, world, stage, until, *, resume=None, saves=(), precision="fp32", native=False, kill_at=None, turns="auto"
):
    """Train on ``world`` ranks until a step, from a checkpoint and into others: the parameters, the norms of the steps.

    Args:
        resume: where the checkpoint lies; ``native`` ones are DeepSpeed's own.
        saves: of each checkpoint after which step it is saved, how and where.
        kill_at: a rank and an event of its own in the first save: see :func:`die_at`.
    """
    model = odd_model()
    optimizer = LoFTAdamW(model, lr=1e-2, params=two_groups(model), turns=turns)
    config = {} if precision == "fp32" else {precision: {"enabled": True}}
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
    engine = start_engine(model, optimizer, world, stage, scheduler=scheduler, gradient_clipping=0.2, **config)
    if resume is not None:
        if native:
            path, _ = engine.load_checkpoint(resume)
            assert path is not None
        else:
            loft_ds.load_checkpoint(engine, resume)
    norms = []
    for step, save, folder in (*saves, (until, None, None)):
        norms += train_engine(engine, rank, world, range(engine.global_steps, step))[0]
        if save is not None:
            if kill_at is not None and rank == kill_at[0]:
                die_at(kill_at[1])
            save(engine, folder)
    params = gathered(model, stage)
    engine.destroy()
    return params, norms


CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}


def die_at(event):
    """Kill this process just before it syncs or changes something on the disk for the ``event``-th time from now on.

    However it does so: as files of their own that come one after the other, too, where a rename was to be expected.
    """
    count = 0

    def happens():
        nonlocal count
        count += 1
        if count == event:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(name, args):
        if name in CHANGES or (name == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)):
            happens()

    sync = os.fsync

    def counted(descriptor):
        happens()
        sync(descriptor)

    os.fsync = counted
    sys.addaudithook(audit)


def plain(until, *, resume=None, save=None, tag=None, model=None, **kwargs):
    """The same training in one process without DeepSpeed."""
    model = odd_model() if model is None else model
    optimizer = LoFTAdamW(model, lr=1e-2, max_grad_norm=0.2, params=two_groups(model), **kwargs)
    base = [group["lr"] for group in optimizer.param_groups]
    start = 0
    if resume is not None:
        loft_ds.load_checkpoint(optimizer, resume, tag)
        start = optimizer.state[optimizer.trainable.factors[0].name]["step"]
    for step in range(start, until):
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr / (1 + 0.1 * step)
        train_alone(model, optimizer, [step])
    if save is not None:
        loft_ds.save_checkpoint(optimizer, save, tag)
    return {name: p.detach().clone() for name, p in trained(model).items()}


@functools.cache
def uninterrupted(turns="auto"):
    return plain(STEPS, turns=turns)


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)


def close(a, b, tolerance=1e-5):
    # 1e-5: the bound for float32; only the order of sums over ranks differs, which leaves 1e-7.
    return max(relative(a[name], b[name]) for name in b) < tolerance


@pytest.mark.parametrize(("turns", "firsts"), [("joint", [3]), ("alternate", [3, 4])])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_same_ranks_bitwise(ranks, tmp_path, stage, precision, turns, firsts):
    """N steps, save, load, M steps are N + M steps to the last bit, with either factor's turn next, of LoFT's
    checkpoints and of DeepSpeed's own; and no save changes what follows."""
    kind = {"precision": precision, "turns": turns}
    whole, norms = ranks(2)(run, stage, STEPS, **kind)[0]
    saves = [(first, save, tmp_path / f"{first}-{save.__name__}") for first in firsts for save in (own, deepspeeds)]
    saving, their_norms = ranks(2)(run, stage, STEPS, saves=saves, **kind)[0]
    assert same(saving, whole)
    assert their_norms == norms
    for first, save, folder in saves:
        resumed, rest = ranks(2)(run, stage, STEPS, resume=folder, native=save is deepspeeds, **kind)[0]
        assert same(resumed, whole), (first, save.__name__)
        assert rest == norms[first:], "DeepSpeed's own clipping came back with its checkpoint"


@pytest.mark.parametrize("turns", ["joint", "alternate"])
def test_state_comes_back_as_it_lay_in_memory(tmp_path, turns):
    """Some CPUs round a matrix product by its operands' strides and alignment, so a bitwise resume needs both."""
    model = odd_model()
    optimizer = LoFTAdamW(model, lr=1e-2, turns=turns)
    train_alone(model, optimizer, range(3))
    loft_ds.save_checkpoint(optimizer, tmp_path)
    resumed = LoFTAdamW(odd_model(), lr=1e-2, turns=turns)
    loft_ds.load_checkpoint(resumed, tmp_path)
    for name, state in optimizer.state.items():
        for key, live in state.items():
            if isinstance(live, torch.Tensor):
                loaded = resumed.state[name][key]
                assert loaded.stride() == live.stride(), (name, key)
                # The (r, r) matrices are in float64: in every product there is a copy of them, scaled or in float32.
                if key not in PAIR_STATE:
                    assert loaded.data_ptr() % 64 == live.data_ptr() % 64 == 0, (name, key)


@pytest.mark.parametrize(
    ("saved", "first", "loaded"),
    [
        ((4, 2), 3, (1, 2)),
        ((4, 2), 4, (2, 2)),
        ((4, 2), 3, (3, 2)),
        ((4, 2), 4, (4, 3)),
        ((3, 3), 3, (3, 2)),
        ((3, 3), 4, (4, 1)),
        ((2, 1), 3, (2, 3)),
        ((2, 0), 4, (3, 3)),
        ((2, 3), 3, (2, 0)),
    ],
    ids=lambda it: f"{it[0]}ranks_stage{it[1]}" if isinstance(it, tuple) else f"step{it}",
)
@pytest.mark.parametrize("turns", ["joint", "alternate"])
def test_other_ranks_and_stages(ranks, tmp_path, saved, loaded, first, turns):
    """The continuation is the uninterrupted run's, whoever takes over."""
    ranks(saved[0])(run, saved[1], first, saves=[(first, own, tmp_path)], turns=turns)
    outcomes = ranks(loaded[0])(run, loaded[1], STEPS, resume=tmp_path, turns=turns)
    assert close(outcomes[0][0], uninterrupted(turns))
    assert all(same(other, outcomes[0][0]) for other, _ in outcomes)


@pytest.mark.parametrize("stage", [1, 3])
def test_to_plain_torch_and_back(ranks, tmp_path, stage):
    ranks(3)(run, stage, 3, saves=[(3, own, tmp_path)])
    assert close(plain(STEPS, resume=tmp_path), uninterrupted())
    plain(5, resume=tmp_path, save=tmp_path / "back")
    files = sorted(p.name for p in (tmp_path / "back" / "global_step5").iterdir())
    assert files == ["manifest.json", "rank-00000-of-00001.safetensors"]


def head_model():
    """A head that is trained whole: a matrix that belongs to no pair."""
    from peft import LoraConfig, get_peft_model
    from torch import nn

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    return get_peft_model(base, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))


def head_under_deepspeed(rank, world, resume, until):
    model = head_model()
    engine = start_engine(model, LoFTAdamW(model, lr=1e-2), world, 2)
    loft_ds.load_checkpoint(engine, resume)
    train_engine(engine, rank, world, range(3, until))  # saved without DeepSpeed, which counts
    params = gathered(model, stage=2)
    engine.destroy()
    return params


def test_matrices_outside_pairs_come_back(ranks, tmp_path):
    """Their moments are kept flat in plain torch too, as any layout may go on from them."""
    model = head_model()
    optimizer = LoFTAdamW(model, lr=1e-2)
    train_alone(model, optimizer, range(3))
    loft_ds.save_checkpoint(optimizer, tmp_path)
    train_alone(model, optimizer, range(3, 6))
    sharded, _ = ranks(2)(head_under_deepspeed, tmp_path, 6)
    assert close(sharded, trained(model))


def test_no_rank_writes_the_whole(ranks, tmp_path):
    """Sizes fall as 1/N, and the frozen base is in none of them."""
    ranks(4)(run, 3, 2, saves=[(2, own, tmp_path)])
    folder = tmp_path / "global_step2"
    sizes = [sum(t.numel() for t in load_file(f).values()) for f in sorted(folder.glob("rank-*"))]
    alike = 3 * 8 * 9  # basis, weights and rotation (r, r) of each factor, with the first rank at most
    assert len(sizes) == 4
    assert max(sizes) < 0.3 * sum(sizes) + alike
    keys = {key.split("|")[0] for f in folder.glob("rank-*") for key in load_file(f)}
    assert keys == set(uninterrupted())


# --- crashes ---


def crash(folder, event, tag):
    """Go on from 2 steps, then die at an event of the save after 4."""
    torch.set_num_threads(1)
    die_at(event)
    plain(4, resume=folder, save=folder, tag=tag)


@pytest.mark.parametrize("tag", [None, "the_same"])
def test_killed_at_any_moment_of_a_save(tmp_path, tag):
    """Whenever the process dies, one whole checkpoint is found, that of before or from some moment on the new one, and
    training goes on from it as if nothing had been."""
    before, found = tmp_path / "before", []
    plain(2, save=before, tag=tag)
    for event in range(1, 100):
        folder = shutil.copytree(before, tmp_path / str(event))
        process = CONTEXT.Process(target=crash, args=(folder, event, tag))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        model = odd_model()
        optimizer = LoFTAdamW(model, params=two_groups(model))
        loft_ds.load_checkpoint(optimizer, folder)
        found.append(max(state["step"] for state in optimizer.state.values()))
        if found[-1] not in found[:-1]:
            assert same(plain(STEPS, resume=folder), uninterrupted()), f"killed at event {event}"
        if process.exitcode == 0:
            break
    assert process.exitcode == 0, "the save has no end"
    assert found == sorted(found), "a step back"
    assert found[0] == 2
    assert found[-1] == 4
    assert len(found) > 10, "the save has fewer events than files to write and to sync: the test misses its point"


@pytest.mark.parametrize("kill_at", [(1, 1), (0, 3), (0, 5), (0, 7)], ids=["second", "first", "manifest", "rename"])
def test_a_rank_killed_in_a_save(ranks, tmp_path, kill_at):
    """A rank dies while it writes: the checkpoint before is the one that is found."""
    ranks(2)(run, 3, 2, saves=[(2, own, tmp_path)])
    with pytest.raises(RuntimeError, match=rf"^rank {kill_at[0]} died"):
        ranks(2)(run, 3, 4, resume=tmp_path, saves=[(4, own, tmp_path)], kill_at=kill_at)
    assert loft_ds.checkpoint.last_tag(tmp_path) == "global_step2"
    assert close(ranks(2)(run, 3, STEPS, resume=tmp_path)[0][0], uninterrupted())


@pytest.mark.parametrize("left", range(0, 5 * 4096, 4096))
def test_a_full_disk_names_the_file_and_leaves_the_checkpoint_before(small_disk, left):
    """Whatever is left of the disk: nothing, the room for a folder, for one file, for most of them."""
    plain(2, save=small_disk)
    filler = fill_disk(small_disk)
    os.truncate(filler, filler.stat().st_size - left)
    with pytest.raises((CheckpointError, OSError), match="No space left") as error:
        plain(4, resume=small_disk, save=small_disk)
    assert str(small_disk / ".global_step4.partial") in str(error.value)
    assert loft_ds.checkpoint.last_tag(small_disk) == "global_step2"
    filler.unlink()
    assert same(plain(STEPS, resume=small_disk), uninterrupted())


# --- damage and strangers ---


def assert_refused(folder, match, **kwargs):
    """Loading raises, and leaves model and optimizer as they were."""
    model = kwargs.pop("model", None) or odd_model()
    optimizer = LoFTAdamW(model, params=two_groups(model), **kwargs)
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    with pytest.raises(CheckpointError, match=match):
        loft_ds.load_checkpoint(optimizer, folder)
    assert same(trained(model), before)
    assert not optimizer.state


def damaged(content, how):
    if how == "empty":
        return b""
    if how == "truncated":
        return content[: len(content) // 2]
    place = {"first": 0, "middle": len(content) // 2, "last": len(content) - 1}[how]
    return content[:place] + bytes([content[place] ^ 0x04]) + content[place + 1 :]


@pytest.mark.parametrize("how", ["empty", "truncated", "first", "middle", "last", "missing"])
@pytest.mark.parametrize("name", ["latest", "manifest.json", "rank-00000-of-00001.safetensors"])
def test_damage_is_named(tmp_path, name, how):
    plain(3, save=tmp_path)
    file = tmp_path / name if name == "latest" else tmp_path / "global_step3" / name
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(damaged(file.read_bytes(), how))
    assert_refused(tmp_path, file.name)


def test_damage_is_an_error_on_every_rank(ranks, tmp_path):
    ranks(2)(run, 2, 2, saves=[(2, own, tmp_path)])
    file = tmp_path / "global_step2" / "rank-00001-of-00002.safetensors"
    file.write_bytes(damaged(file.read_bytes(), "middle"))
    for said in ranks(2)(refusals, tmp_path):
        assert "rank-00001-of-00002.safetensors: is damaged" in said


def normalised():
    """A model with a saved module that has buffers of its own, and the name of one of them."""
    from peft import LoraConfig, get_peft_model
    from torch import nn

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    (name,) = (name for name, _ in model.named_buffers() if name.endswith("modules_to_save.default.running_mean"))
    return model, name


def running_statistics(rank, world, folder, load):
    """The running mean of a saved module after training and saving, or after loading."""
    model, name = normalised()
    engine = start_engine(model, LoFTAdamW(model), world, 2)
    said = None
    if load:
        try:
            loft_ds.load_checkpoint(engine, folder)
        except CheckpointError as error:
            said = str(error)
    else:
        for step in range(3):
            engine.backward(engine(batch(step)[0]).square().mean())
            engine.step()
        loft_ds.save_checkpoint(engine, folder)
    mean = model.get_buffer(name).clone()
    engine.destroy()
    return mean, said


def test_buffers_come_back_in_plain_torch(tmp_path):
    model, name = normalised()
    optimizer = LoFTAdamW(model)
    model(batch(0)[0]).square().mean().backward()
    optimizer.step()
    loft_ds.save_checkpoint(optimizer, tmp_path)
    resumed, _ = normalised()
    assert not resumed.get_buffer(name).any()
    loft_ds.load_checkpoint(LoFTAdamW(resumed), tmp_path)
    assert torch.equal(resumed.get_buffer(name), model.get_buffer(name))


def test_buffers_come_back_or_their_damage_is_named(ranks, tmp_path):
    ((mean, _),) = ranks(1)(running_statistics, tmp_path, False)
    assert mean.any()
    ((loaded, _),) = ranks(1)(running_statistics, tmp_path, True)
    assert torch.equal(loaded, mean)
    file = tmp_path / "global_step3" / "buffers.safetensors"
    file.write_bytes(damaged(file.read_bytes(), "middle"))
    ((untouched, said),) = ranks(1)(running_statistics, tmp_path, True)
    assert "buffers.safetensors: is damaged" in said
    assert not untouched.any()


def refusals(rank, world, folder):
    try:
        run(rank, world, 2, 4, resume=folder)
    except CheckpointError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("model", "kwargs", "difference"),
    [
        ({"rank": 2}, {}, r"lora_A\.default\.weight has shape \[3, 7\], in this model \[2, 7\]"),
        (
            {},
            {"blocks": Blocks(second_moment="elementwise")},
            "saved with second_moment=matrix, not second_moment=elementwise",
        ),
        ({"targets": ["0", "2", "4"]}, {}, r"has base_model\.model\.6\.\S+, which this model does not train"),
        ({"targets": ["0", "2", "3", "4", "6"]}, {}, r"has no base_model\.model\.3\.\S+, which this model trains"),
    ],
)
def test_strangers_are_refused(tmp_path, model, kwargs, difference):
    plain(3, save=tmp_path)
    if "targets" in model:
        from peft import LoraConfig, get_peft_model
        from torch import nn

        other = odd_model().unload()
        if "3" in model["targets"]:
            other[3] = nn.Linear(5, 5)
        config = LoraConfig(r=3, lora_alpha=7, target_modules=model["targets"], modules_to_save=["5"], bias="lora_only")
        other = get_peft_model(other, config)
    else:
        other = odd_model(**model)
    assert_refused(tmp_path, difference, model=other, **kwargs)


def test_another_rule_of_turns_is_refused(tmp_path, monkeypatch):
    plain(3, save=tmp_path)
    monkeypatch.setattr("loft_ds.optimizer.JOINT_RANK", 2)
    assert_refused(tmp_path, "saved with joint_rank=16, not joint_rank=2")


def test_the_release_before_is_named(tmp_path):
    """Its state cannot be gone on from, which is said with what to do instead."""
    (tmp_path / "global_step3").mkdir()
    write_json(tmp_path / "global_step3" / "manifest.json", {"format": 1})
    (tmp_path / "latest").write_text("global_step3")
    assert_refused(tmp_path, r"global_step3/manifest\.json: was written by loft_ds 0\.1, .* export_adapter there")


def test_other_groups_are_refused(tmp_path):
    plain(3, save=tmp_path)
    model = odd_model()
    with pytest.raises(CheckpointError, match="its parameters are in 2 other groups"):
        loft_ds.load_checkpoint(LoFTAdamW(model), tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "rank-00000-of-00001.safetensors"])
def test_pickles_never_run(tmp_path, name):
    """Also where somebody has made the digests fit."""
    plain(3, save=tmp_path)
    folder, sentinel = tmp_path / "global_step3", tmp_path / "ran"
    (folder / name).write_bytes(pickle.dumps(Bomb(sentinel)))
    pickle.loads((folder / name).read_bytes())
    assert sentinel.exists(), "the bomb is a dud"
    sentinel.unlink()
    if name != "manifest.json":
        manifest = read_json(folder / "manifest.json")
        manifest["files"][name] = digest(folder / name)
        write_json(folder / "manifest.json", manifest)
    assert_refused(tmp_path, name)
    assert not sentinel.exists()


# --- DeepSpeed's own tools, and adapters ---


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_to_fp32_reads_the_masters(ranks, tmp_path, stage):
    """DeepSpeed's own consolidation works on what ``engine.save_checkpoint`` wrote of a LoFT run."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    params, _ = ranks(2)(run, stage, 3, saves=[(3, deepspeeds, tmp_path)])[0]
    masters = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    for name, param in params.items():
        assert torch.equal(masters[name], param), name


def export(rank, world, stage, steps, folder):
    model = odd_model()
    engine = start_engine(model, LoFTAdamW(model, lr=1e-2), world, stage)
    train_engine(engine, rank, world, range(steps))
    loft_ds.export_adapter(engine, folder)
    train_engine(engine, rank, world, [steps])  # training goes on
    engine.destroy()


@pytest.mark.parametrize(("world", "steps"), [(1, 5), (2, 0)])
def test_adapters_are_the_same_from_every_stage(ranks, tmp_path, world, steps):
    """Byte for byte, where the weights are: of one rank after training, of two before it."""
    for stage in range(4):
        ranks(world)(export, stage, steps, tmp_path / str(stage))
    files = [(tmp_path / str(stage) / "adapter_model.safetensors").read_bytes() for stage in range(4)]
    assert files[0] == files[1] == files[2] == files[3]
    tensors = load_file(tmp_path / "3" / "adapter_model.safetensors")
    assert all(t.numel() for t in tensors.values())
    from peft import PeftModel

    base = odd_model().unload()
    model = PeftModel.from_pretrained(base, tmp_path / "3")
    expected = odd_model()
    if not steps:
        x, _ = batch(0)
        assert torch.equal(model(x), expected(x))


def export_merged(rank, world, stage, folder):
    """Train a tiny Llama, export and merge it: its logits before."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=1, **size)).save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    engine = start_engine(model, LoFTAdamW(model, lr=1e-2), world, stage)
    ids = torch.arange(12).view(2, 6)
    for _ in range(3):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    loft_ds.export_adapter(engine, folder / "adapter", merge=True)
    logits = engine(input_ids=ids).logits.detach()
    engine.destroy()
    return ids, logits


@pytest.mark.parametrize("stage", [0, 3])
def test_merged_on_request(ranks, tmp_path, stage):
    """``merge=True`` leaves a plain model that computes what base and adapter do."""
    from transformers import AutoModelForCausalLM

    ((ids, logits),) = ranks(1)(export_merged, stage, tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter" / "merged")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2
    # Merging adds the product to the weight before the input instead of after it: a few float32 ulps of the logits.
    assert torch.allclose(merged(ids).logits, logits, atol=1e-5)


def test_a_start_from_gradients_belongs_to_other_weights(tmp_path):
    """LoRA-GA's adapter is none of the model on disk: said at once, merging refused, and PEFT's way out works."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.lora import LoraGAConfig, preprocess_loraga

    def base():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5))

    model = base()
    x, y = torch.randn(12, 7), torch.randn(12, 5)
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    preprocess_loraga(model, config, lambda: (model(x) - y).square().mean().backward())
    model = get_peft_model(model, config)
    model.save_pretrained(tmp_path / "start")
    with pytest.warns(UserWarning, match=r"start of default \(lora_ga\) was taken out of the frozen weights"):
        optimizer = LoFTAdamW(model, lr=1e-2)
    for _ in range(3):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(ValueError, match="merge=True"):
        loft_ds.export_adapter(optimizer, tmp_path / "refused", merge=True)
    assert not (tmp_path / "refused").exists()
    loft_ds.export_adapter(optimizer, tmp_path / "adapter")
    trained = model(x).detach()
    as_saved = PeftModel.from_pretrained(base(), tmp_path / "adapter")(x)
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    converted = PeftModel.from_pretrained(base(), tmp_path / "converted")
    assert converted.peft_config["default"].r == 4
    # The same sums in another order: a few float32 ulps.
    assert torch.allclose(converted(x), trained, atol=1e-5)
    assert not torch.allclose(as_saved, trained, atol=1e-3)
