"""Every script in launch/ on real parts: each trains the same tiny model, and must find what one process finds."""

from __future__ import annotations

import functools
import importlib.machinery
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import hosts as namespaces
import jsonschema
import pytest
import yaml
from hosts import INTERFACE, Hosts
from launch_helpers import CONFIGS, ROOT, free_port, losses, make_model, write_text

from loft_ds.training import train
from loft_ds.training.arguments import parse
from loft_ds.training.checks import LaunchError

LAUNCH = ROOT / "launch"
STEPS, SAVE, BATCH = 40, 5, 12
LIMIT = 300  # seconds until a job counts as hung; on two free cores none takes 60


def environment(**settings: object) -> dict[str, str]:
    """This process's, with the programs of its Python first and one thread a process."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in settings.items()}}


def until(condition: Callable[[], object], what: str, job: Job | None = None) -> None:
    """Waits for something to become true, and no longer for what cannot: a job that has ended."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert job is None or job.process.poll() is None, f"ended before {what}:\n{job.log.read_text()}"
        assert time.monotonic() < deadline, f"no {what} after {LIMIT} s" + (f":\n{job.log.read_text()}" if job else "")
        time.sleep(0.05)


@dataclass
class Job:
    process: subprocess.Popen[Any]
    log: Path

    def succeeds(self) -> None:
        until(lambda: self.process.poll() is not None, f"end of {self.log.name}")
        assert self.process.returncode == 0, self.log.read_text()


Start = Callable[..., Job]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a command in the folder of its log. What then still runs is ended with the test."""
    jobs: list[Job] = []

    def start(log: Path, command: list[object], **kwargs: Any) -> Job:
        with log.open("w") as file:
            options = {"cwd": log.parent, "stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(list(map(str, command)), start_new_session=True, **options, **kwargs)
        jobs.append(Job(process, log))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.poll() is None:
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()


@dataclass
class Rehearsal:
    """What all launchers train, in a folder of its own, and what one process makes of it."""

    folder: Path
    model: Path
    text: Path

    @functools.cached_property
    def expected(self) -> dict[int, float]:
        command = [sys.executable, LAUNCH / "train.py", *self.flags(self.folder / "run", 1)]
        subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL)
        curve = losses(self.folder / "run")
        assert list(curve) == list(range(1, STEPS + 1))
        assert curve[STEPS] < 0.96 * curve[1], "the curve is flat, so it could not tell"
        return curve

    def flags(self, folder: Path, ranks: int) -> list[str]:
        """The arguments of ``train.py`` under which so many ranks share a batch of the same blocks."""
        return [
            *("--model_name_or_path", str(self.model), "--train_file", str(self.text), "--output_dir", str(folder)),
            *("--max_steps", str(STEPS), "--save_strategy", "steps", "--save_steps", str(SAVE)),
            *("--learning_rate", "5e-3", "--lora_rank", "4"),
            *("--block_size", "32", "--per_device_train_batch_size", str(BATCH // ranks)),
            *("--disable_tqdm", "True", "--report_to", "none"),
            *(("--deepspeed", str(CONFIGS / "zero2.json")) if ranks > 1 else ()),
        ]

    def check(self, folder: Path, ranks: int) -> None:
        """The run in ``folder`` was one of so many ranks, from the first step to the last, and found the same."""
        assert json.loads((folder / "metrics.json").read_text())["world_size"] == ranks
        curve = losses(folder)
        assert list(curve) == list(self.expected)
        # float32; several ranks sum a batch in another order than one does, and 40 steps carry that on.
        assert list(curve.values()) == pytest.approx(list(self.expected.values()), rel=1e-3)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> Rehearsal:
    folder = tmp_path_factory.mktemp("one")
    return Rehearsal(folder, make_model(folder / "model"), write_text(folder / "text.txt"))


@pytest.fixture
def make_hosts() -> Iterator[Callable[[int], Hosts]]:
    """``make_hosts(n)`` are n hosts that last until the test's end."""
    made: list[Hosts] = []

    def make(count: int) -> Hosts:
        if reason := namespaces.missing():
            pytest.skip(reason)
        made.append(Hosts(count))
        return made[-1]

    yield make
    for each in made:
        each.close()


def need(*programs: tuple[str, str]) -> None:
    """Skips where a program of a Debian package is not installed."""
    for program, package in programs:
        if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin"):
            pytest.skip(f"needs {program} of Debian's {package}")


def checkpoint(folder: Path, step: int) -> Path:
    """The file that is written last of a checkpoint."""
    return folder / f"checkpoint-{step}" / "trainer_state.json"


def stop(job: Job, run: Path) -> None:
    """Sends SIGTERM to a launcher's script in mid-run: all ranks save and end."""
    until(checkpoint(run, SAVE).exists, "first checkpoint", job)
    job.process.terminate()
    assert job.process.wait(timeout=LIMIT) == 128 + signal.SIGTERM, job.log.read_text()
    assert "saved after step" in job.log.read_text()
    assert not (run / "metrics.json").exists(), "the job was over before it was told to stop"
    left = subprocess.run(["pgrep", "-af", run], capture_output=True, text=True, check=False)
    assert not left.stdout, "the script ended before its ranks"


# --- torchrun


# In seconds: when a silent host counts as dead, and how long a round waits for more hosts than it needs. torchrun's own
# values, 15 and 30, are only slower.
QUICKLY = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=1"
ELASTIC = {"NNODES": "2:3", "NPROC": 1, "MASTER_ADDR": "node0", "PET_RDZV_CONF": QUICKLY}


@pytest.mark.rehearse
def test_torchrun_goes_on_with_another_host_in_place_of_a_dead_one(rehearsal, make_hosts, start, tmp_path):
    hosts, run = make_hosts(3), tmp_path / "run"
    env = environment(GLOO_SOCKET_IFNAME=INTERFACE, **ELASTIC)
    command = [LAUNCH / "torchrun" / "run.sh", *rehearsal.flags(run, 2)]
    first, second = (start(tmp_path / f"node{i}.log", hosts.on(i, command), env=env) for i in (0, 1))
    until(checkpoint(run, 2 * SAVE).exists, "second checkpoint", first)
    hosts.kill(1)
    assert not (run / "metrics.json").exists(), "the job was over before its host died"
    before = checkpoint(run, SAVE).stat().st_mtime_ns
    third = start(tmp_path / "node2.log", hosts.on(2, command), env=env)
    first.succeeds()
    third.succeeds()
    assert second.process.wait(timeout=LIMIT) != 0
    assert checkpoint(run, SAVE).stat().st_mtime_ns == before, "it began anew in place of going on"
    rehearsal.check(run, 2)


@pytest.mark.rehearse
def test_torchrun_takes_in_a_host_that_joins(rehearsal, make_hosts, start, tmp_path):
    hosts, run, steps = make_hosts(3), tmp_path / "run", 150
    env = environment(GLOO_SOCKET_IFNAME=INTERFACE, **ELASTIC)
    long = ("--max_steps", str(steps), "--save_steps", "50")
    command = [LAUNCH / "torchrun" / "run.sh", *rehearsal.flags(run, 2), *long]
    jobs = [start(tmp_path / f"node{i}.log", hosts.on(i, command), env=env) for i in (0, 1)]
    until(lambda: (run / "log.jsonl").exists() and '"loss"' in (run / "log.jsonl").read_text(), "first step", jobs[0])
    jobs.append(start(tmp_path / "node2.log", hosts.on(2, command), env=env))
    for job in jobs:
        job.succeeds()
    assert "saved after step" in jobs[0].log.read_text()
    assert json.loads((run / "metrics.json").read_text())["world_size"] == 3
    curve = losses(run)
    assert list(curve) == list(range(1, steps + 1))
    assert curve[1] == pytest.approx(rehearsal.expected[1], rel=1e-3), "two ranks began"
    assert curve[steps] < rehearsal.expected[STEPS], "it did not go on learning"


# --- DeepSpeed


def serve_ssh(hosts: Hosts, folder: Path, start: Start) -> None:
    """A real sshd on each host; root may go from each to each by one key."""
    Path("/run/sshd").mkdir(exist_ok=True)  # where Debian's sshd locks its unprivileged part in
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    server = {"HostKey": key, "AuthorizedKeysFile": f"{key}.pub", "StrictModes": "no", "PidFile": "none"}
    client = {
        "IdentityFile": key,
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": "/dev/null",
        "LogLevel": "ERROR",
    }
    for host in range(len(hosts.names)):
        etc = hosts.etc(host) / "ssh"
        etc.mkdir()
        for name, settings in (("sshd_config", server), ("ssh_config", client)):
            (etc / name).write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        job = start(folder / f"sshd{host}.log", hosts.on(host, ["/usr/sbin/sshd", "-D", "-e"]))
        until(lambda job=job: "listening" in job.log.read_text(), "sshd that listens", job)


@pytest.mark.rehearse
def test_deepspeed_over_ssh_to_the_hosts_of_a_hostfile(rehearsal, make_hosts, start, tmp_path):
    need(("sshd", "openssh-server"), ("pdsh", "pdsh"))
    hosts, run = make_hosts(3), tmp_path / "run"
    serve_ssh(hosts, tmp_path, start)
    (tmp_path / "hostfile").write_text("# a comment\n\n" + "".join(f"{name} slots=1\n" for name in hosts.names))
    # Of the environment DeepSpeed hands over NCCL's and Python's part, and what this file says.
    (tmp_path / ".deepspeed_env").write_text(f"GLOO_SOCKET_IFNAME={INTERFACE}\nOMP_NUM_THREADS=1\nHF_HUB_OFFLINE=1\n")
    command = [LAUNCH / "deepspeed" / "run.sh", *rehearsal.flags(run, 3), "--resume_from_checkpoint", "True"]
    env = environment(HOSTFILE="hostfile")
    stop(start(tmp_path / "first.log", hosts.on(0, command), env=env), run)
    job = start(tmp_path / "second.log", hosts.on(0, command), env=env)
    job.succeeds()
    rehearsal.check(run, 3)
    assert {line.split(":")[0] for line in job.log.read_text().splitlines()} >= set(hosts.names)  # pdsh says who spoke


@pytest.mark.rehearse
def test_deepspeed_without_ssh(rehearsal, make_hosts, start, tmp_path):
    hosts, run = make_hosts(2), tmp_path / "run"
    (tmp_path / "hostfile").write_text("node0 slots=1\nnode1 slots=1\n")
    command = [LAUNCH / "deepspeed" / "run.sh", *rehearsal.flags(run, 2)]
    jobs = [
        start(
            tmp_path / f"node{i}.log",
            hosts.on(i, command),
            env=environment(HOSTFILE="hostfile", NODE_RANK=i, GLOO_SOCKET_IFNAME=INTERFACE),
        )
        for i in range(2)
    ]
    for job in jobs:
        job.succeeds()
    rehearsal.check(run, 2)


# --- Open MPI, and DeepSpeed's on one host


@pytest.mark.rehearse
@pytest.mark.parametrize(("launcher", "ranks"), [("mpi", 2), ("deepspeed", 1)])
def test_sigterm_to_the_script_saves_and_it_goes_on(rehearsal, start, tmp_path, launcher, ranks):
    """By the same command, or on as many ranks as are left."""
    if launcher == "mpi":
        need(("mpirun", "openmpi-bin"))
        pytest.importorskip("mpi4py", reason="needs mpi4py")
    need(("pkill", "procps"))
    run, hostfile = tmp_path / "run", tmp_path / "hostfile"
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": 1, "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": 1}
    where = {"mpi": {"NPROC": 2, **as_root}, "deepspeed": {"HOSTFILE": hostfile}}[launcher]
    env = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), **where)
    command = [LAUNCH / launcher / "run.sh", *rehearsal.flags(run, 2), "--resume_from_checkpoint", "True"]
    hostfile.write_text("localhost slots=2\n")
    stop(start(tmp_path / "first.log", command, env=env), run)
    before = checkpoint(run, SAVE).stat().st_mtime_ns
    hostfile.write_text(f"localhost slots={ranks}\n")
    command += ["--per_device_train_batch_size", BATCH // ranks]
    start(tmp_path / "second.log", command, env=env).succeeds()
    assert checkpoint(run, SAVE).stat().st_mtime_ns == before, "it began anew in place of going on"
    rehearsal.check(run, ranks)


# --- Slurm


def serve_slurm(hosts: Hosts, folder: Path, start: Start) -> Path:
    """A Slurm cluster of the hosts, one processor each, with munge and all its files in ``folder``; its configuration.

    Jobs of the partition ``urgent`` preempt those of the usual one.
    ``cred_expire`` is how many seconds a requeued job waits at least; Slurm's own default is 120.
    """
    key, socket = folder / "munge.key", folder / "munge.socket"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    config = folder / "slurm.conf"
    settings = {
        "ClusterName": "rehearsal",
        "SlurmctldHost": hosts.names[0],
        "SlurmUser": "root",
        "AuthInfo": f"socket={socket},cred_expire=5",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "%n",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "%n.pid",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SlurmdParameters": "config_overrides",
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=1",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
    }
    nodes = (
        f"NodeName={','.join(hosts.names)} CPUs=1\n"
        f"PartitionName=all Nodes=ALL Default=YES PriorityTier=1 GraceTime={LIMIT}\n"
        "PartitionName=urgent Nodes=ALL PriorityTier=2\n"
    )
    config.write_text("".join(f"{key}={value}\n" for key, value in settings.items()) + nodes)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # named, so that none is looked for; none is used
    for name in ("state", *hosts.names):
        (folder / name).mkdir()

    files = {"socket": socket, "key-file": key, "pid-file": folder / "munge.pid", "seed-file": folder / "munge.seed"}
    flags = [f"--{name}={path}" for name, path in files.items()]
    munged = ["/usr/sbin/munged", "--foreground", "--force", f"--log-file={folder / 'munge.log'}", *flags]
    munge = start(folder / "munged.log", hosts.on(0, munged))
    until(socket.exists, "munged", munge)
    env = environment(SLURM_CONF=config)
    control = start(folder / "slurmctld.log", hosts.on(0, ["/usr/sbin/slurmctld", "-D"]), env=env)
    for i, name in enumerate(hosts.names):
        start(folder / f"{name}.log", hosts.on(i, ["/usr/sbin/slurmd", "-D"]), env=env)

    def idle() -> bool:
        states = hosts.run(0, ["sinfo", "-hNo", "%T", "-p", "all"], env=env, capture_output=True, text=True)
        return states.stdout.split() == ["idle"] * len(hosts.names)

    until(idle, "idle nodes", control)
    return config


@pytest.mark.rehearse
def test_slurm_brings_a_job_back_where_it_was(rehearsal, make_hosts, start, tmp_path):
    need(("munged", "munge"), ("slurmctld", "slurm-wlm"), ("slurmd", "slurm-wlm"))
    hosts, run = make_hosts(2), tmp_path / "run"
    env = environment(SLURM_CONF=serve_slurm(hosts, tmp_path, start), GLOO_SOCKET_IFNAME=INTERFACE)

    def slurm(*command: str, **more: str) -> str:
        done = hosts.run(0, [*command], env=env | more, cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout

    def submit(*options: str, flags: list[str], **more: str) -> str:
        script = str(LAUNCH / "slurm" / "train.sbatch")
        return slurm("sbatch", "--parsable", *options, "--output=%j.out", script, *flags, **more).strip()

    def job(number: str) -> dict[str, str]:
        words = slurm("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def over(number: str) -> bool:
        return job(number)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING")

    def reached(number: str, step: int) -> bool:
        assert not over(number), (tmp_path / f"{number}.out").read_text()
        return checkpoint(run, step).exists()

    number = submit("--nodes=2", "--ntasks-per-node=1", flags=rehearsal.flags(run, 2))
    until(lambda: reached(number, SAVE), "first checkpoint")
    slurm("scancel", "--batch", "--signal=USR1", number)  # as Slurm does ahead of the time limit
    until(lambda: job(number)["Restarts"] == "1", "requeued job")
    before = checkpoint(run, SAVE).stat().st_mtime_ns
    # Preempted before it trains again, the job would have nothing to save.
    later = max(step for step in range(SAVE, STEPS, SAVE) if checkpoint(run, step).exists()) + SAVE
    until(lambda: reached(number, later), f"checkpoint {later}")
    doctor = ["--deepspeed", str(CONFIGS / "zero2.json"), "--output_dir", str(tmp_path), "--megabytes", "1"]
    urgent = ("--partition=urgent", "--nodes=2", "--ntasks-per-node=1")
    examined = submit(*urgent, flags=doctor, PROGRAM="-m loft_ds.doctor")
    until(lambda: job(number)["Restarts"] == "2", "preempted job")
    assert not (run / "metrics.json").exists(), "the job was over before it was preempted"
    until(lambda: over(examined), "end of the doctor")
    assert job(examined)["JobState"] == "COMPLETED", (tmp_path / f"{examined}.out").read_text()
    assert "2 on node0 (1), node1 (1)" in (tmp_path / f"{examined}.out").read_text()
    until(lambda: over(number), "end of the job")
    assert job(number)["JobState"] == "COMPLETED", (tmp_path / f"{number}.out").read_text()
    assert checkpoint(run, SAVE).stat().st_mtime_ns == before, "it began anew in place of going on"
    assert (tmp_path / f"{number}.out").read_text().count("saved after step") == 2
    rehearsal.check(run, 2)

    cancelled = submit("--nodes=1", "--ntasks=1", flags=rehearsal.flags(run, 2))
    until(lambda: (tmp_path / f"{cancelled}.out").exists(), "started job")
    slurm("scancel", cancelled)
    until(lambda: over(cancelled), "end of the cancelled job")
    assert (job(cancelled)["JobState"], job(cancelled)["Restarts"]) == ("CANCELLED", "0")


# --- Kubernetes


@pytest.fixture
def manifest() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "kubernetes" / "pytorchjob.yaml").read_text())


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads((Path(__file__).parent / "pytorchjob.schema.json").read_text()))


def container(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]


def test_the_manifest_fits_the_operator_s_schema(manifest, schema):
    schema.validate(manifest)
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    # What the operator's admission webhook asks for beyond the schema.
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", manifest["metadata"]["name"])
    assert container(manifest)["name"] == "pytorch"
    elastic, workers = manifest["spec"]["elasticPolicy"], manifest["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert 1 <= elastic["minReplicas"] <= workers["replicas"] <= elastic["maxReplicas"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["spec"].update(nprocPerNode=8), "8 is not of type 'string'"),
        (lambda m: m["spec"].update(elasticPolcy={}), "'elasticPolcy' was unexpected"),
        (lambda m: m["spec"].pop("pytorchReplicaSpecs"), "'pytorchReplicaSpecs' is a required property"),
        (lambda m: m["spec"]["elasticPolicy"].update(maxReplicas="4"), "'4' is not of type 'integer'"),
        (lambda m: container(m).update(volumeMount=[]), "'volumeMount' was unexpected"),
        (lambda m: container(m)["env"].append({"name": "N", "value": 1}), "1 is not of type 'string'"),
        (lambda m: container(m)["volumeMounts"][0].pop("mountPath"), "'mountPath' is a required property"),
        (lambda m: container(m)["resources"]["limits"].update(memory="16 GB"), "'16 GB' does not match"),
    ],
)
def test_the_schema_finds_mistakes_in_the_manifest(manifest, schema, change, message):
    change(manifest)
    with pytest.raises(jsonschema.ValidationError, match=re.escape(message)):
        schema.validate(manifest)


def test_the_manifest_s_arguments_are_those_of_train_py(manifest):
    pytorch = container(manifest)
    assert pytorch["command"] == ["torchrun", "launch/train.py"]
    args = parse(pytorch["args"])
    assert (ROOT / args.deepspeed).is_file()
    assert args.resume_from_checkpoint == "True"
    mounted = [mount["mountPath"] for mount in pytorch["volumeMounts"]]
    for path in (args.model_name_or_path, *args.train_file, args.output_dir):
        assert any(Path(path).is_relative_to(folder) for folder in mounted), path
    gpus = pytorch["resources"]["limits"]["nvidia.com/gpu"]
    assert str(gpus) == manifest["spec"]["nprocPerNode"]


# --- what they all rest on


def test_no_folder_in_launch_hides_a_package_of_its_name():
    # Python puts the folder of train.py first on its path. A folder without __init__.py yields to a package anywhere.
    spec = importlib.machinery.PathFinder.find_spec("deepspeed", [str(LAUNCH), *sys.path])
    assert spec is not None
    assert spec.origin == deepspeed.__file__
    assert (LAUNCH / "deepspeed").is_dir()
    assert not list(LAUNCH.glob("*/__init__.py"))


def test_deepspeed_needs_a_launcher(rehearsal, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(LaunchError, match="start it by a launcher"):
        train.train(rehearsal.flags(tmp_path, 2))


def test_mpirun_needs_mpi4py(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "2")
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LaunchError, match="needs mpi4py"):
        train.discover_mpi_ranks()
