"""Workers as processes of this machine, reached through sockets that nobody else can open."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from piflux.launch import cores
from piflux.serving.messages import Command, Gone, Load, Told

LOOPBACK = "127.0.0.1"

PROCESS_END_S = 1.0
"""How long a process may take to end once its connection is closed."""


class Store:
    """A store where ranks meet, which ends with the object.

    It answers once torch is imported, for which ranks need not wait to start. Who connects before
    waits until then.

    Args:
        address: of this host, at which alone it listens.

    Attributes:
        port: there.
    """

    def __init__(self, address: str) -> None:
        # The store's own socket would be open to every network.
        listening = socket.create_server((address, 0), backlog=128)
        self.port = int(listening.getsockname()[1])
        self._kept: Any = None
        self._keeping = threading.Thread(
            target=self._keep, args=(address, listening), daemon=True, name="piflux-store"
        )
        self._keeping.start()

    def _keep(self, address: str, listening: socket.socket) -> None:
        with listening:  # where it can't be kept nobody waits for it
            import torch.distributed as dist

            self._kept = dist.TCPStore(
                address,
                self.port,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=listening.fileno(),
            )
            listening.detach()


def among_themselves() -> dict[str, str]:
    """The environment by which ranks of one host reach each other, and nobody else reaches them."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return dict.fromkeys(names, "lo") if sys.platform == "linux" else {}


class LocalWorkers:
    """Starts a process a rank on this machine, each with a GPU of its own, if there are any.

    To import what a rank needs takes longer than most of what else it does before it can draw. So
    there may be a spare process that has done so, and takes the place of the next rank that is
    lost. It holds no model, and has touched no GPU.

    Args:
        ranks: how many there will be at a time.
        load: what they will be told to load.
        cache: a folder where compiled code is kept; None for torch's own place.
    """

    def __init__(self, ranks: int, load: Load, cache: Path | None = None) -> None:
        self._ranks, self._load, self._cache = ranks, load, cache
        self._store: Store | None = None
        self._spare: _Process | None = None

    def open(self) -> tuple[str, int]:
        self._store = Store(LOOPBACK)
        return LOOPBACK, self._store.port

    def start(self, number: int, hear: Callable[[Told], None]) -> LocalWorker:
        spare, self._spare = self._spare, None
        if spare is None or not spare.is_alive:
            spare = _Process(self._environment(), self._load)
        return LocalWorker(number, number, spare, hear)

    def prepare(self) -> None:
        if self._spare is None or not self._spare.is_alive:
            self._spare = _Process(self._environment(), self._load)

    def _environment(self) -> dict[str, str]:
        joined = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
        environment = {name: text for name, text in os.environ.items() if name not in joined}
        environment["TOKENIZERS_PARALLELISM"] = "false"
        for name, text in among_themselves().items():
            environment.setdefault(name, text)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // self._ranks)))
        if self._cache is not None:
            environment["TORCHINDUCTOR_CACHE_DIR"] = str(self._cache)
        return environment

    def close(self) -> None:
        self._store = None
        if self._spare is not None:
            self._spare.kill()
            self._spare.end()


class _Process:
    """A process that imports what ranks need, and then waits to be told which one it is."""

    def __init__(self, environment: dict[str, str], load: Load) -> None:
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "piflux.serving.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL,
            )
        finally:
            theirs.close()
        self.pid = self._process.pid
        self.connection = Connection(ours.detach())
        self.connection.send(load)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> int:
        """Waits for its end, not for long, and gives the exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PROCESS_END_S)
        self._process.kill()  # one whose connection broke can't be told anything
        return self._process.wait()


class Process(Protocol):
    """Where `piflux.serving.worker.attend` runs."""

    @property
    def connection(self) -> Connection:
        """To it. What it is to load has been sent."""

    def kill(self) -> None:
        """End it at once."""

    def end(self) -> int | None:
        """Waits for its end, not for long, and gives the exit code; None if nobody knows it."""


class LocalWorker:
    """A process that becomes a rank. Two threads read what it tells, and write commands.

    Args:
        number: the rank's.
        gpu: its place among those of this machine.
        process: that waits to be told.
        hear: see `Workers.start`.
    """

    def __init__(
        self, number: int, gpu: int, process: Process, hear: Callable[[Told], None]
    ) -> None:
        self._number, self.process, self._hear = number, process, hear
        self._commands: queue.SimpleQueue[Command | tuple[int, int] | None] = queue.SimpleQueue()
        self._commands.put((number, gpu))
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True, name=f"piflux-worker-{number}").start()

    def send(self, command: Command) -> None:
        self._commands.put(command)

    def kill(self) -> None:
        self.process.kill()

    def _read(self) -> None:
        gone: Gone | None = None
        try:
            while True:
                told = self.process.connection.recv()
                if isinstance(told, Gone):  # it says why, and is about to end
                    gone = told
                else:
                    self._hear(told)
        except (EOFError, OSError):  # it has ended, or is about to
            pass
        finally:
            self._commands.put(None)
            code = self.process.end()
            self._hear(gone or Gone(_ended(self._number, code)))

    def _write(self) -> None:
        while (command := self._commands.get()) is not None:
            try:
                self.process.connection.send(command)
            except OSError:  # it has ended, of which the other thread tells
                return


def _ended(number: int, code: int | None) -> str:
    if code is None:
        return f"rank {number} has ended"
    if code < 0:
        return f"rank {number} was killed by {signal.Signals(-code).name}"
    return f"rank {number} ended with exit code {code}"
