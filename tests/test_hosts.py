"""The hosts that the launchers are rehearsed on: they reach each other, and nothing once cut."""

import subprocess
import sys

import hosts as namespaces
import pytest
from hosts import Hosts

# Says its name, what it calls itself, and answers one connection.
SERVER = """
import socket
server = socket.create_server(("", 5000))
print(socket.gethostname(), socket.gethostbyname(socket.gethostname()), flush=True)
while True:
    server.accept()[0].sendall(b"hello")
"""
CLIENT = """
import socket, sys
print(socket.create_connection((sys.argv[1], 5000), timeout=float(sys.argv[2])).recv(5).decode())
"""


@pytest.fixture
def two():
    if reason := namespaces.missing():
        pytest.skip(reason)
    with Hosts(2) as hosts:
        yield hosts


def ask(hosts, seconds):
    """The answer that node0 gets from node1 within so many seconds, and the exit status."""
    command = [sys.executable, "-c", CLIENT, hosts.names[1], str(seconds)]
    done = hosts.run(0, command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return done.stdout.strip(), done.returncode


def test_hosts_reach_each_other_until_one_is_cut_or_dies(two):
    server = two.popen(1, [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout.readline().split() == ["node1", "127.0.1.1"]
    assert two.pids(1) == [server.pid]
    assert ask(two, 10) == ("hello", 0)
    two.cut(1)
    assert ask(two, 1) == ("", 1)
    two.mend(1)
    assert ask(two, 10) == ("hello", 0)
    two.kill(1)
    server.communicate(timeout=10)
    assert server.returncode == -9
    assert two.pids(1) == []


def test_a_host_reaches_nothing_but_the_hosts(two):
    routes = two.run(0, ["ip", "route"], capture_output=True, text=True, check=True).stdout
    assert routes.split()[:3] == ["10.77.0.0/24", "dev", "eth0"]
    assert len(routes.splitlines()) == 1
