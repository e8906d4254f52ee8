"""The soak works: a few faults of each sort, after which the training ends where the unbroken one does."""

import hashlib
import json
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import soak

from loft_ds.checkpoint.files import write_json
from loft_ds.checkpoint.manifest import MANIFEST


@pytest.mark.study
def test_the_quick_form():
    unbroken, other, same, moved = soak.main(["--quick"])  # ends the process if anything was lost
    faults = Counter(same["faults"]) + Counter(moved["faults"])
    assert {soak.STOP, soak.KILL} < set(faults)
    assert sum(faults.values()) >= soak.QUICK.faults  # a run may be over before its last one is due
    jobs = same["jobs"] + moved["jobs"]
    assert any(job.get("first", 1) > 1 for job in jobs), "nothing went on from a checkpoint"
    assert len({job["ranks"] for job in moved["jobs"]}) > 1
    for run in (unbroken, other, same, moved):
        assert len(run["losses"]) == soak.QUICK.steps
    assert same["losses"] == unbroken["losses"]
    assert other["bytes that differ"] > 0, "float32 sums in another order round otherwise, or nothing is compared"
    assert unbroken["losses"][-1] < 0.96 * unbroken["losses"][0], "the curve is flat, so it could not tell"


def entry(name, **values):
    none = dict.fromkeys(
        ("steps lost", "steps missing", "bytes damaged", "ranks hung", "of these with another loss"), 0
    )
    none |= dict.fromkeys(("bytes that differ", "furthest loss", "furthest weights"), 0)
    return {"name": name, "faults": {}, **none, **values}


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        (soak.SAME, "steps lost", 1),
        (soak.MOVED, "steps missing", 1),
        (soak.MOVED, "bytes damaged", 8),
        (soak.SAME, "ranks hung", 1),
        (soak.MOVED, "of these with another loss", 1),
        (soak.SAME, "bytes that differ", 1),
        (soak.SAME, "furthest loss", 1e-9),
        (soak.MOVED, "furthest loss", 1.1e-5),
        (soak.MOVED, "furthest weights", 1.1e-5),
    ],
)
def test_a_loss_is_a_violation(name, key, value):
    unbroken, other = entry("unbroken"), entry("unbroken, 1 rank", **{"furthest loss": 1e-4})
    well = entry(soak.MOVED, faults={soak.KILL: 3}, **{"bytes that differ": 9, "furthest loss": 9e-6})
    assert soak.find_violations([unbroken, other, well]) == []
    (violation,) = soak.find_violations([unbroken, other, entry(name, faults={soak.KILL: 3}, **{key: value}), well])
    assert key in violation


def save(out, step, content=b"state", whole=True):
    """A checkpoint of one file; ``content`` is what has become of it."""
    folder = out / f"checkpoint-{step}"
    (folder / "tag").mkdir(parents=True)
    (folder / "latest").write_text("tag")
    (folder / "tag" / "file").write_bytes(content)
    write_json(folder / "tag" / MANIFEST, {"files": {"file": hashlib.sha256(b"state").hexdigest()}})
    if whole:
        (folder / "trainer_state.json").write_text("{}")


def log(out, steps, job):
    lines = [json.dumps({"step": step, "loss": 1 / step, "step_time": job + step / 1000}) for step in steps]
    out.mkdir(exist_ok=True)
    with (out / soak.LOG).open("a") as file:
        file.write("\n".join(lines) + "\n" + lines[0][:9])  # a line half written


@pytest.fixture
def run(tmp_path):
    return soak.Run(SimpleNamespace(folder=tmp_path, scale=soak.QUICK), "run")


def note(run, code=-9, **facts):
    run._note({"ranks": 2, "stage": 2, "codes": [code, code], **facts})
    return run.jobs[-1]


def test_what_was_saved_must_be_there(run):
    log(run.out, range(1, 13), 0)
    save(run.out, 10)
    save(run.out, 12, whole=False)
    job = note(run)
    assert (job["first"], job["last"], job["whole"], job["torn"]) == (1, 12, 10, 1)
    assert (job["lost"], job["checked"], job["damaged"]) == (0, 5, 0)
    shutil.rmtree(run.out / "checkpoint-10")
    assert note(run)["lost"] == 10


def test_a_job_must_go_on_where_the_last_one_saved(run):
    save(run.out, 10)
    log(run.out, range(1, 13), 0)
    note(run)
    (run.out / soak.LOG).unlink()
    log(run.out, range(6, 15), 1)
    assert note(run)["lost"] == 5
    assert soak.done_again(run) == {
        "steps done again": 7,
        "on the same ranks and stage": 7,
        "of these with another loss": 0,
    }
    run.losses[12][1] = (1, 0.5)
    assert soak.done_again(run)["of these with another loss"] == 1


def test_sigterm_saves_the_last_step(run):
    save(run.out, 10)
    log(run.out, range(1, 13), 0)
    assert note(run, code=soak.STOPPED)["lost"] == 2


def test_damaged_bytes_are_counted(run):
    save(run.out, 5, b"stale")
    assert note(run)["damaged"] == 5
