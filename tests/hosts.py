"""Several hosts on one machine: network namespaces with names of their own, joined by veths to a switch.

    with Hosts(2) as hosts:
        hosts.run(0, ["ping", "-c1", hosts.names[1]], check=True)
        job = hosts.popen(1, ["sleep", "100"])
        hosts.cut(1)  # as if its cable was pulled
        hosts.kill(1)  # as if its power went

They share files and process ids, as nodes with one home folder do the files, and nothing with the machine's network.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

INTERFACE = "eth0"


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def missing() -> str | None:
    """Why there can be no hosts here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip"):
        return "network namespaces need Debian's iproute2"
    try:
        with Hosts(1):
            return None
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed here: {error.stderr.strip()}"


class Hosts:
    """``count`` hosts named node0, node1, ... at 10.77.0.1, 10.77.0.2, ...

    As on a fresh Debian each host's own name means 127.0.1.1 to itself, and its address to all others.
    """

    def __init__(self, count: int) -> None:
        self.names = [f"node{host}" for host in range(count)]
        self.addresses = [f"10.77.0.{host + 1}" for host in range(count)]
        prefix = f"loft-{secrets.token_hex(3)}"
        self._switch = f"{prefix}-switch"
        self._spaces = [f"{prefix}-{name}" for name in self.names]
        try:
            self._join()
        except BaseException:
            self.close()
            raise

    def _join(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "bridge", "up", "type", "bridge")
        for host, (space, address) in enumerate(zip(self._spaces, self.addresses, strict=True)):
            _ip("netns", "add", space)
            peer = ("peer", "name", f"port{host}", "netns", self._switch)
            _ip("link", "add", INTERFACE, "netns", space, "type", "veth", *peer)
            _ip("-n", self._switch, "link", "set", f"port{host}", "up", "master", "bridge")
            _ip("-n", space, "address", "add", f"{address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _ip("-n", space, "link", "set", interface, "up")
            # `ip netns exec` mounts what lies here over /etc.
            hosts = Path("/etc/netns", space, "hosts")
            hosts.parent.mkdir(parents=True)
            others = [f"{self.addresses[i]} {name}\n" for i, name in enumerate(self.names) if i != host]
            hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.names[host]}\n" + "".join(others))

    def on(self, host: int, command: list[str]) -> list[str]:
        """The command line that runs ``command`` on a host."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.names[host]]
        return ["ip", "netns", "exec", self._spaces[host], *named, *map(str, command)]

    def popen(self, host: int, command: list[str], **kwargs: Any) -> subprocess.Popen[Any]:
        """``subprocess.Popen`` on a host; its process id is that of the command itself."""
        return subprocess.Popen(self.on(host, command), **kwargs)

    def run(self, host: int, command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[Any]:
        """``subprocess.run`` on a host."""
        return subprocess.run(self.on(host, command), **kwargs)

    def cut(self, host: int) -> None:
        """Pulls the host's cable: nothing goes in or out, and no connection is told so."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "down")

    def mend(self, host: int) -> None:
        """Puts the cable back."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "up")

    def pids(self, host: int) -> list[int]:
        """The processes of a host."""
        return [int(pid) for pid in _ip("netns", "pids", self._spaces[host]).split()]

    def kill(self, host: int) -> None:
        """Ends every process of a host at once, and waits until they are gone.

        Raises:
            TimeoutError: A process outlives SIGKILL by ten seconds.
        """
        deadline = time.monotonic() + 10
        while pids := self.pids(host):
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:  # it went by itself in between
                    continue
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.names[host]}: {pids} do not end")
            time.sleep(0.01)

    def close(self) -> None:
        """Ends what still runs on the hosts and removes them."""
        for host, space in enumerate(self._spaces):
            if Path("/run/netns", space).exists():
                self.kill(host)
                _ip("netns", "delete", space)
            shutil.rmtree(Path("/etc/netns", space), ignore_errors=True)
        if Path("/run/netns", self._switch).exists():
            _ip("netns", "delete", self._switch)

    def __enter__(self) -> Hosts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
