"""Real gloo process groups for tests, made cheap.

Importing torch and diffusers costs seconds, so a fork server imports them once, worker processes
are forked from it, joined in one gloo group, and reused by one test after the other. Under pytest
the server is itself forked, from a process that has imported all tests and run none. Where there
are GPUs, ranks import for themselves.
"""

import faulthandler
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import resource_tracker, util
from multiprocessing.connection import Connection, wait
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

import piflux

# For a log that nobody reads Dynamo measures each capture's guards, on caches that it first fills
# with 32 MB of something else.
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0

PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.models.transformers.transformer_sd3",
    "diffusers.pipelines.flux.pipeline_flux",
    "peft",
    "pytest",
    "piflux",
    "ranks",
    "models",
    "oracle",
    "captures",
    "warm",
]

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GLOO_SOCKET_IFNAME": "lo",
}


@dataclass(frozen=True)
class Failure:
    """What a rank raised, as text: an exception need not survive pickling to be judged."""

    kinds: tuple[str, ...]
    message: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        kinds = tuple(_name(kind) for kind in type(error).__mro__)
        return cls(kinds, str(error), "".join(traceback.format_exception(error)))

    @classmethod
    def death(cls, exitcode: int | None) -> "Failure":
        return cls((DIED,), f"the process ended with exit code {exitcode}", "")

    def isa(self, kind: type[BaseException]) -> bool:
        return _name(kind) in self.kinds

    @property
    def died(self) -> bool:
        return self.kinds == (DIED,)


DIED = "died"


class RanksFailed(AssertionError):
    """A rank raised, died or hung in a job that was meant to succeed."""


def _tell(failed: dict[int, Failure]) -> str:
    """What the ranks met, the same failure of several ranks once."""
    told: dict[str, list[int]] = {}
    for rank, failure in failed.items():
        told.setdefault(failure.traceback or failure.message, []).append(rank)
    return "\n".join(f"ranks {ranks}: {text}" for text, ranks in told.items())


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class Pool:
    """`size` worker processes; `joined` in one gloo group whose collectives give up in time."""

    def __init__(self, size: int, *, joined: bool = True, group_timeout: float = 60) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="ranks")
        context = _context()
        # Here, where it outlives any of them.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = self._store.port
        self._workers = []
        self._connections: list[Connection] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            worker = context.Process(
                target=_work,
                args=(rank, size, Path(self._folder.name), joined and port, group_timeout, theirs),
                daemon=True,
            )
            with mock.patch.dict(os.environ, ONE_THREAD):
                worker.start()
            theirs.close()
            self._workers.append(worker)
            self._connections.append(ours)

    def run(self, n: int, fn, *args, timeout: float) -> list:
        """`fn(rank, group, *args)` on n ranks: each one's result, or the Failure it met."""
        # Apart, since whoever has no part in it need not import what it takes.
        job = pickle.dumps((n, pickle.dumps((fn, args))))
        for connection in self._connections:
            connection.send_bytes(job)
        outcomes: list = [None] * self.size
        waiting = dict(zip(self._connections, range(self.size), strict=True))
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), deadline - time.monotonic())
            if not ready:
                raise RanksFailed(self._hang(sorted(waiting.values()), timeout))
            for connection in ready:
                rank = waiting.pop(connection)
                outcomes[rank] = self._outcome(rank, connection)
        return outcomes[:n]

    def _outcome(self, rank: int, connection: Connection):
        try:
            return pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self._workers[rank].join(60)
            return Failure.death(self._workers[rank].exitcode)

    def _hang(self, ranks: list[int], timeout: float) -> str:
        """Kill the pool; say where each hung rank was."""
        for rank in ranks:
            os.kill(self._workers[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        stacks = [f"rank {rank}:\n{_stacks(self._folder.name, rank).read_text()}" for rank in ranks]
        self.close()
        return "\n".join([f"ranks {ranks} did not end within {timeout} s", *stacks])

    def close(self) -> None:
        for worker, connection in zip(self._workers, self._connections, strict=True):
            connection.close()
            worker.kill()
        for worker in self._workers:
            worker.join()
        self._folder.cleanup()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Ranks:
    """The session's ranks, started when first asked for; a job takes the first so many.

    One pool, so that ranks have captured a model that was called on another number of them: of the
    four that suffice for most, until a job takes more.
    """

    def __init__(self) -> None:
        self._pool: Pool | None = None

    def __call__(self, n: int, fn, *args, timeout: float = 240) -> list:
        """`fn(rank, group, *args)` on n ranks, all of which must succeed."""
        return _succeeded(self._run(n, fn, *args, timeout=timeout))

    def alone(self, n: int, fn, *args, timeout: float = 240) -> list:
        """The same on ranks of its own: the default process group is theirs."""
        with Pool(n) as pool:
            return _succeeded(pool.run(n, fn, *args, timeout=timeout))

    def launch(self, n: int, fn, *args, timeout: float = 240) -> list:
        """`fn(*args)` on n ranks that are as torchrun starts them, in no group yet."""
        with Pool(n, joined=False) as pool:
            job = (launched, n, free_port(), fn, args)
            return _succeeded(pool.run(n, *job, timeout=timeout))

    def errors(self, n: int, fn, *args, timeout: float = 240) -> list[Failure | None]:
        """The same for jobs meant to fail: each rank's Failure, None where it succeeded."""
        outcomes = self._run(n, fn, *args, timeout=timeout)
        return [got if isinstance(got, Failure) else None for got in outcomes]

    def _run(self, n: int, fn, *args, timeout: float) -> list:
        if self._pool and self._pool.size < n:
            self.close()
        self._pool = self._pool or Pool(max(n, 4))
        try:
            outcomes = self._pool.run(n, fn, *args, timeout=timeout)
        except BaseException:
            self.close()
            raise
        # A rank that raised may have left its peers inside a collective: trust none of them.
        if any(isinstance(got, Failure) for got in outcomes):
            self.close()
        return outcomes

    def close(self) -> None:
        if self._pool:
            self._pool.close()
        self._pool = None


def virtual(n: int, fn, *args) -> list:
    """The same on ranks of this process: `fn(0, group, *args)` runs once, for all of them."""
    return [fn(0, piflux.virtual_ranks(n), *args)]


def _succeeded(outcomes: list) -> list:
    failed = {rank: got for rank, got in enumerate(outcomes) if isinstance(got, Failure)}
    if failed:
        raise RanksFailed(_tell(failed))
    return outcomes


def launched(rank: int, group: None, world: int, port: int, fn, args):
    """`fn(*args)` on a rank that is as torchrun starts it, in no group yet."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return fn(*args)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


_waiting: list[int] = []
"""Where to write that ranks are wanted: a server that was forked waits for it."""


def fork_server() -> None:
    """Have this process forked for the fork server, which then captures once ranks are wanted.

    For a process that has imported what ranks import, and done nothing that they should not know.
    """
    if torch.cuda.device_count():
        return
    resource_tracker.ensure_running()  # which is a process, too
    with mock.patch.object(util, "spawnv_passfds", _forked):
        _start_server()


def _forked(path: str, args: list[str], passed: Sequence[int]) -> int:
    """As `util.spawnv_passfds`, of which `args` end in a line of Python; it waits to be wanted."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid:
        os.close(reads)
        _waiting.append(writes)
        return pid
    try:
        os.close(writes)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for name in os.listdir("/dev/fd"):
            # Pipes would else seem to have a second end when this process' parent has ended.
            if (fd := int(name)) not in (0, 1, 2, reads, nowhere, *passed):
                os.dup2(nowhere, fd)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", 1, closefd=False) for fd in (1, 2))
        multiprocessing.forkserver._forkserver.__init__()  # its lock is held
        if os.read(reads, 1):
            exec(args[-1], {})
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(0)


def _context():
    if torch.cuda.device_count():
        # What is forked of a process in which a library asked for its GPUs can't use them.
        return multiprocessing.get_context("spawn")
    context = _start_server()
    if _waiting:
        os.write(_waiting.pop(), b"!")
    return context


def _start_server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # The server imports the preload list from a bare interpreter, so it needs our path spelled out.
    environment = ONE_THREAD | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with mock.patch.dict(os.environ, environment):
        multiprocessing.forkserver.ensure_running()
    return context


def _stacks(folder: str | Path, rank: int) -> Path:
    return Path(folder) / f"stacks-{rank}"


def _work(
    rank: int,
    size: int,
    folder: Path,
    port: int,
    group_timeout: float,
    connection: Connection,
) -> None:
    """A worker's life: join the group, then do jobs until the other end hangs up."""
    faulthandler.register(signal.SIGUSR1, file=_stacks(folder, rank).open("w"))
    torch.set_num_threads(1)
    groups: dict[int, dist.ProcessGroup | None] = {}
    if port:
        dist.init_process_group(
            "gloo",
            store=dist.TCPStore("127.0.0.1", port, is_master=False),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=group_timeout),
        )
        groups[size] = dist.group.WORLD
    while True:
        try:
            job = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_do(job, rank, bool(port), groups))


def _do(job: bytes, rank: int, joined: bool, groups: dict) -> bytes:
    try:
        n, work = pickle.loads(job)
        if joined and n not in groups:
            groups[n] = dist.new_group(range(n))
        if rank >= n:
            return pickle.dumps(None)
        fn, args = pickle.loads(work)
        return pickle.dumps(fn(rank, groups.get(n), *args))
    except Exception as error:
        return pickle.dumps(Failure.of(error))
