"""A tiny Llama with a tokenizer of its own, and two ranks to run launch/train.py on."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import random
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loft_ds.training.logs import read_log

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "ds_configs"
CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


def write_text(path: Path, words: int = 4000) -> Path:
    """Text that a model can learn something from within a few steps: few words, always in pairs."""
    choose = random.Random(0)
    pairs = ["red apple ", "green leaf ", "blue sky ", "white snow ", "black coal\n"]
    path.write_text("".join(choose.choice(pairs) for _ in range(words // 2)))
    return path


def make_model(folder: Path) -> Path:
    """Saves a random Llama of 32 hidden features and a byte-level tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(special_tokens=["<end>"], initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def fill_disk(disk: Path) -> Path:
    """Writes a file until the disk is full."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return filler


# Below those that the kernel gives to outgoing connections, of which one could take a port before its job listens; and
# each process tries them in another order.
PORTS = itertools.cycle(random.sample(range(10_000, 30_000), 20_000))


def free_port() -> int:
    """A port that nobody listens on."""
    for port in PORTS:
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise AssertionError("PORTS never end")


def unlaunched(*modules: Path) -> dict[str, str]:
    """This process's environment without what a launcher would say, for commands that find these folders' modules."""
    kept = {key: value for key, value in os.environ.items() if key not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}
    return {**kept, "PYTHONPATH": os.pathsep.join(map(str, modules))} if modules else kept


class Hub(ThreadingHTTPServer):
    """A model hub on this machine, as far as pushing to it goes: it keeps what it is given.

    Attributes:
        commits: of each commit the message, and the contents by their paths.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        """Says nothing."""

    def do_POST(self) -> None:
        body = self._body()
        repository = f"{self.server.url}/somebody/run"
        if self.path == "/api/repos/create":
            self._answer({"url": repository})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            head, *entries = (json.loads(line) for line in body.splitlines())
            files = {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in entries}
            self.server.commits.append((head["value"]["summary"], files))
            self._answer({"commitUrl": f"{repository}/commit/{40 * '1'}", "commitOid": 40 * "1"})
        else:
            assert self.path == "/api/validate-yaml", self.path
            self._answer({"warnings": [], "errors": []})

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while size := int(self.rfile.readline(), 16):  # in chunks
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, content: dict[str, object]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def losses(folder: Path) -> dict[int, float]:
    """The loss of every step of a run of launch/train.py, over all its restarts."""
    return {entry["step"]: entry["loss"] for entry in read_log(folder) if "loss" in entry}


def train_configs(rank: int, world_size: int, port: int, flags: list[str], configs: list[str], out: str) -> None:
    """One rank of ``launch/train.py`` under each config in turn; ``torch.multiprocessing`` starts it."""
    from accelerate.state import AcceleratorState, PartialState

    from loft_ds.training import train  # in the child: importing starts no process group

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    train.prepare_process()
    for config in configs:
        train.train([*flags, "--deepspeed", config, "--output_dir", str(Path(out) / Path(config).stem)])
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
    torch.distributed.destroy_process_group()
