"""A rank that dies, hangs or is cut off: every rank ends within a bounded time, and one says which it was and why.

A collective that lost a rank fails at once (gloo, when a connection closes) or after ``--ddp_timeout`` seconds, but
does not know which rank it was. So each rank has a thread that notes every few seconds, in a file of its own in
``<output_dir>/_ranks``, that it lives and where it is. Files, because the checkpoints need a folder that all ranks see
anyway, and it outlives any rank and any connection.

NCCL ends the process at the time-out, and no Python is told. So the note also says how many collectives its rank has
begun: shortly before the time-out, the rank that has begun fewer than one that waits is the one that hangs. Ranks that
evaluate, save or load for long are not judged while none waits for another: the time-out would not end them either.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import CheckpointError
from ..ranks import bound_collectives, collectives_begun, rank_and_world
from ..zero.config import SettingsError

NOTE_BYTES = 8192  # written over in place: a full disk must not make a rank look dead
ERROR_CHARACTERS = 500  # of an error in a note, which stays whole even where JSON spells each with 12 bytes
SILENT = 24  # intervals without a new note until a rank counts as dead
UNREADABLE = (OSError, json.JSONDecodeError)
NEAR = 0.9  # the part of the time-out that a rank waits until it says for whom


class Watch(TrainerCallback):
    """A block that all ranks leave, whatever happens to one of them.

    With ``interval`` seconds between two notes (5, or a 20th of the timeout if that is less): where a collective
    failed, a rank without a new note for 4 of them is called dead, one that neither fails nor ends is called
    hanging. Without any failure, a rank without a new note for ``SILENT`` of them is called dead, and once the first
    step has ended, one that keeps others waiting for the part ``NEAR`` of the timeout is called hanging.

    Args:
        folder: the run's output folder.
        timeout: seconds that a collective may take.
    """

    def __init__(self, folder: str | Path, timeout: float) -> None:
        self._rank, self._world = rank_and_world()
        self._folder = Path(folder) / "_ranks"  # what begins with _ the Trainer does not push to the hub
        self._timeout = timedelta(seconds=timeout)
        self._interval = min(5.0, timeout / 20)
        self._own: dict[str, Any] = {"host": socket.gethostname(), "beat": 0, "step": 0, "begun": 0}
        self._own |= {"error": None, "master": True}
        self._main = threading.main_thread()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        bound_collectives(self._timeout)  # also of the groups that DeepSpeed has just made

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._own["step"] = state.global_step

    def __enter__(self) -> Watch:
        if self._world == 1:
            return self
        self._folder.mkdir(parents=True, exist_ok=True)
        self._note()
        if self._rank == 0:
            for left in self._folder.glob("*"):  # of a run before, with more ranks or with a fault
                if not left.name.isdigit() or int(left.name) >= self._world:
                    left.unlink()
            (self._folder / "well").touch()
        dist.barrier()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A user's mistake is the same on every rank, and the caller's to say.
        if self._world > 1 and isinstance(error, Exception) and not isinstance(error, SettingsError):
            self._fail(error)
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(self._interval)  # a network disk may keep it
            self._path(self._rank).unlink(missing_ok=True)
            if self._rank == 0:
                (self._folder / "well").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # whoever leaves last finds it empty
                self._folder.rmdir()

    def _path(self, rank: int) -> Path:
        return self._folder / f"{rank:05d}"

    def _note(self) -> None:
        with self._lock:
            self._own["beat"] += 1
            self._own["begun"] = collectives_begun()
            frame = sys._current_frames().get(self._main.ident or 0)
            if frame is not None:
                code = frame.f_code
                self._own["where"] = f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"
            descriptor = os.open(self._path(self._rank), os.O_WRONLY | os.O_CREAT)
            try:
                os.pwrite(descriptor, json.dumps(self._own)[:NOTE_BYTES].ljust(NOTE_BYTES).encode(), 0)
            finally:
                os.close(descriptor)

    def _read(self, rank: int) -> dict[str, Any] | None:
        """The last note of a rank; None where it has ended as it should."""
        try:
            note: dict[str, Any] = json.loads(self._path(rank).read_text())
        except FileNotFoundError:
            return None
        return note

    def _look(self, before: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """The last notes of all ranks that have not ended as they should; as before where one cannot be read now."""
        notes = dict(before)
        for rank in range(self._world):
            with contextlib.suppress(*UNREADABLE):
                note = self._read(rank)
                if note is None:
                    notes.pop(rank, None)
                else:
                    notes[rank] = note
        return notes

    def _run(self) -> None:
        """The thread: note, and look at the next rank and at whether any rank has found a fault.

        It counts its looks and not the seconds, in which a disk that all share may have kept all of them.
        """
        neighbour = (self._rank + 1) % self._world
        last: dict[str, Any] | None = None
        silent = waiting = 0
        while not self._ended.wait(self._interval):
            # A network disk's bad moment, or a note half written: nothing is learnt, so nobody is judged.
            with contextlib.suppress(*UNREADABLE):
                if (self._folder / "fault").exists():
                    self._ended.wait(2 * self._interval)  # time for the main thread to say what it has to
                    self._leave()
                begun = self._own["begun"]
                self._note()
                note = self._read(neighbour)
                silent = silent + 1 if note is not None and note == last else 0
                waits = note and last and note["begun"] == last["begun"] < begun == self._own["begun"]
                waiting = waiting + 1 if waits and self._own["step"] else 0
                last = note
                if note is not None and silent > SILENT:
                    self._say(self._dead(neighbour, note, silent * self._interval))
                    self._leave()
                if not silent and waiting * self._interval > NEAR * self._timeout.total_seconds():
                    behind = {rank: other for rank, other in self._look({}).items() if other["begun"] < begun}
                    if behind:  # and has not just come
                        self._say(self._hanging(behind))
                        self._leave()

    def _fail(self, error: Exception) -> None:
        """Says what ended this rank, unless another rank has said what ended the job, and leaves."""
        words = f"rank {self._rank} on {self._own['host']}: {type(error).__name__}: {error}"
        bound = threading.Timer(SILENT * self._interval, self._leave_alone, [words])
        bound.daemon = True
        bound.start()
        if _is_of_a_collective(error):
            # First: whoever reads of the error judges by both.
            self._own["master"] = _reaches_master(self._interval)
            self._own["error"] = str(error).partition("\n")[0][:ERROR_CHARACTERS]
            with contextlib.suppress(OSError):  # others then call this rank hanging
                self._note()
            self._say(f"{self._verdict()}. Rank {self._rank} saw: {self._own['error']}")
        else:
            trace = "" if isinstance(error, CheckpointError) else "".join(traceback.format_exception(error))
            self._say(words, trace)
        self._leave()

    def _verdict(self) -> str:
        """Which ranks a collective failed for, found by looking at the others' notes for a while."""
        first = self._look({})
        notes, dead, well = first, [], []
        began = time.monotonic()
        while time.monotonic() - began < 5 * self._interval:
            time.sleep(self._interval / 2)
            notes = self._look(notes)
            waited = time.monotonic() - began
            dead = [rank for rank, note in notes.items() if waited > 4 * self._interval and note == first.get(rank)]
            well = [rank for rank, note in notes.items() if note["error"] is None and rank not in dead]
            if not well:
                break
        if dead:
            return ", ".join(self._dead(rank, notes[rank], waited) for rank in dead)
        if well:
            return self._hanging({rank: notes[rank] for rank in well})
        cut = [rank for rank, note in notes.items() if not note["master"]]
        return (
            ", ".join(
                f"rank {rank} on {notes[rank]['host']} is cut off: it does not reach rank 0 on {notes[0]['host']}"
                for rank in cut
            )
            or "all ranks are alive and reach rank 0, but a collective between them failed"
        )

    def _dead(self, rank: int, note: dict[str, Any], seconds: float) -> str:
        return (
            f"rank {rank} on {note['host']} died or was stopped after step {self._own['step']}: "
            f"no sign of life for {seconds:.0f} s"
        )

    def _hanging(self, notes: dict[int, dict[str, Any]]) -> str:
        return ", ".join(
            f"rank {rank} on {note['host']} hangs: it is alive, but does nothing after step {note['step']} "
            f"in {note['where']}"
            for rank, note in notes.items()
        )

    def _say(self, message: str, trace: str = "") -> None:
        """Speaks for all ranks, if none has spoken yet. A rename needs no space on the disk and succeeds once."""
        try:
            (self._folder / "well").rename(self._folder / "fault")
        except FileNotFoundError:
            if (self._folder / "fault").exists():
                return
        print(f"{trace}train.py: error: {message}", file=sys.stderr)

    def _leave_alone(self, words: str) -> None:
        """Ends a process that the disk keeps from asking and telling the others."""
        print(f"train.py: error: {words} ({self._folder} does not answer)", file=sys.stderr, flush=True)
        os._exit(1)

    def _leave(self) -> None:
        """Ends the process without teardown, which waits for other ranks."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


@contextlib.contextmanager
def bounded_joining(timeout: float) -> Iterator[None]:
    """A block that joins the process group, and that no rank stays in for ever.

    On a CPU the TrainingArguments start the group, with torch's half an hour for a rank that does not come. And an open
    connection to a rank 0 that is stopped or cut off has no time-out at all.

    Args:
        timeout: seconds that a collective may take. Waiting for the others may take as long, and the first collective.
    """

    def leave() -> None:
        rank, world, host, port = map(os.environ.get, ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        print(
            f"train.py: error: rank {rank} on {socket.gethostname()}: the {world} ranks did not all meet at "
            f"{host}:{port} within {2 * timeout:g} s: one has died, was stopped, or does not reach it",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(2 * timeout, leave)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _is_of_a_collective(error: BaseException | None) -> bool:
    """Whether an error says that other ranks could not be reached: torch's, or gloo's, whose type is RuntimeError."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _reaches_master(seconds: float) -> bool:
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection(address, timeout=seconds).close()
    except OSError:
        return False
    return True
