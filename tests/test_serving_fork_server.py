"""The fork server: ranks' processes that are forked from one that has imported what they need."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
from servers import until

from piflux.serving import fork_server
from piflux.serving.fork_server import Forked
from piflux.serving.messages import Gone, Load, Step
from piflux.serving.processes import LocalWorker

LOAD = Load("demo", "eager")

SCRIPT = """
import os, socket, sys, time
from piflux.serving.fork_server import serve

def told(connection):
    try:
        return connection.recv()
    except EOFError:
        return "end"

def live(connection):
    while (word := told(connection)) != "end":
        if word == "print":
            print("printed by a rank", flush=True)
        if word == "hang":
            time.sleep(600)
        if word == "fail":
            raise ValueError("as it was told")
        connection.send((word, os.getpid()))

serve(socket.socket(fileno=int(sys.argv[1])), 0, live, float(sys.argv[2]))
"""
"""A fork server whose ranks say what they are told, and which process they are."""


class Served:
    """It, where to ask, and ranks that are ended with the test."""

    def __init__(self, place: str, idle_s: float = 600.0) -> None:
        self.place = place
        self.ranks: list[Forked] = []
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(place)
            listening.listen()
            self.process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(listening.fileno()), str(idle_s)],
                pass_fds=[listening.fileno()],
                stdin=subprocess.PIPE,
            )

    def rank(self) -> tuple[Forked, int]:
        """A new rank, and its process."""
        rank = Forked(self.place, LOAD)
        self.ranks.append(rank)
        told, pid = rank.connection.recv()
        assert told == LOAD
        return rank, pid

    def end(self) -> None:
        for rank in self.ranks:
            rank.connection.close()
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    found = Served(str(tmp_path_factory.mktemp("fork_server") / "ranks"))
    yield found
    found.end()


def test_a_rank_is_forked_and_its_end_is_told(served: Served, capfd) -> None:
    (one, first), (two, second) = served.rank(), served.rank()
    assert len({first, second, served.process.pid}) == 3
    one.connection.send("print")
    assert one.connection.recv() == ("print", first)
    assert capfd.readouterr().out == "printed by a rank\n"  # here, where it was asked for
    one.connection.send("end")
    two.connection.send("fail")
    assert (one.end(), two.end()) == (0, 1)
    assert "as it was told" in capfd.readouterr().err
    assert not psutil.pid_exists(first)


def test_a_rank_that_hangs_can_be_killed(served: Served) -> None:
    rank, _ = served.rank()
    rank.connection.send("hang")
    rank.kill()
    rank.kill()
    with pytest.raises((EOFError, ConnectionResetError)):
        rank.connection.recv()
    assert rank.end() == -signal.SIGKILL


def test_a_rank_ends_with_who_asked_for_it(served: Served) -> None:
    """It hangs, so it doesn't see that its connection broke."""
    rank, pid = served.rank()
    other, living = served.rank()
    rank.connection.send("hang")
    rank.connection.close()
    rank._control.close()
    until(lambda: not psutil.pid_exists(pid))
    other.connection.send("x")
    assert other.connection.recv() == ("x", living)


def test_who_connects_and_asks_for_nothing_is_let_go(served: Served) -> None:
    with socket.socket(socket.AF_UNIX) as nobody:
        nobody.connect(served.place)
    served.rank()


def test_ranks_outlive_their_fork_server(tmp_path: Path) -> None:
    killed = Served(str(tmp_path / "killed"))
    rank, pid = killed.rank()
    killed.process.kill()
    killed.process.wait()
    rank.connection.send("x")
    assert rank.connection.recv() == ("x", pid)
    rank.connection.send("end")
    assert rank.end() is None  # nobody knows how
    with pytest.raises(ConnectionRefusedError):
        Forked(killed.place, LOAD)
    killed.end()


def test_a_fork_server_ends_without_ranks_or_with_who_started_it(tmp_path: Path) -> None:
    (tmp_path / "idle").mkdir()
    (tmp_path / "left").mkdir()
    idle = Served(str(tmp_path / "idle" / "ranks"), 0.01)
    left = Served(str(tmp_path / "left" / "ranks"))
    rank, pid = left.rank()
    left.process.stdin.close()
    assert (idle.process.wait(60), left.process.wait(60)) == (0, 0)
    assert not list(tmp_path.iterdir())  # nothing is left of where they were
    rank.connection.send("x")
    assert rank.connection.recv() == ("x", pid)
    idle.end()
    left.end()


def test_what_cannot_be_forked_each_rank_imports(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(fork_server, "MAPS", tmp_path / "maps")
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "0")  # and as it was after the test
    monkeypatch.setattr(fork_server, "import_for", lambda load: None)
    fork_server.MAPS.write_text("7f00 r-xp /usr/lib/libc.so.6\n")
    assert fork_server._import(LOAD) == ""
    assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"
    fork_server.MAPS.write_text("7f00 r-xp /usr/lib/libcuda.so.1\n")
    assert "GPU" in fork_server._import(LOAD)

    def broken(load: Load) -> None:
        raise ImportError("no such library")

    monkeypatch.setattr(fork_server, "import_for", broken)
    assert "no such library" in fork_server._import(LOAD)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "can't be forked" in fork_server._import(LOAD)


BROKEN = """
import sys
from multiprocessing.connection import Connection
from piflux.serving import worker

def broken(load):
    raise ImportError("no such library\\nand more")

worker.import_for = broken
worker.attend(Connection(int(sys.argv[1])))
"""


def test_a_rank_that_cannot_begin_says_why() -> None:
    ours, theirs = socket.socketpair()
    with Connection(ours.detach()) as connection, theirs:
        rank = subprocess.Popen(
            [sys.executable, "-c", BROKEN, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
            text=True,
        )
        connection.send(LOAD)
        assert connection.recv() == Gone("a rank failed: ImportError: no such library")
        _, printed = rank.communicate(timeout=60)
    assert rank.returncode == 1 and "Traceback" in printed


class Process:
    """One that has told so much, and ended."""

    def __init__(self, code: int | None, *told: Any) -> None:
        self.connection: Any = self
        self._code, self._told = code, list(told)

    def recv(self) -> Any:
        if not self._told:
            raise EOFError
        return self._told.pop(0)

    def send(self, command: Any) -> None:
        pass

    def kill(self) -> None:
        pass

    def end(self) -> int | None:
        return self._code


@pytest.mark.parametrize(
    "told, code, reason",
    [
        ([Gone("rank 3 failed: x")], 1, "rank 3 failed: x"),
        ([], 1, "rank 3 ended with exit code 1"),
        ([], -9, "rank 3 was killed by SIGKILL"),
        ([], None, "rank 3 has ended"),
    ],
)
def test_why_a_rank_is_gone_is_told_once(told: list[Any], code: int | None, reason: str) -> None:
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
    LocalWorker(3, 0, Process(code, Step(1, 1, 3), *told), heard.put)
    assert [heard.get(timeout=60), heard.get(timeout=60)] == [Step(1, 1, 3), Gone(reason)]
    assert heard.empty()
