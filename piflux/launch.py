"""Starting one process a rank on this host, and ending them all together.

Imports torch only where ranks are started or joined: arguments are checked before.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piflux.errors import Excluded, PifluxError, RankFailed, plain

if TYPE_CHECKING:
    import torch

END_S = 3.0
"""How long ranks may take to end once the result is there."""


def is_joined() -> bool:
    """Whether torchrun, or something with its environment, started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this process is the one rank that speaks, or no rank at all."""
    return os.environ.get("RANK", "0") == "0"


def launch(function: Callable[..., Any], ranks: int, *args: Any, outlives: bool = False) -> Any:
    """Call `function(*args)` in new processes of this host, each with torchrun's environment.

    This process holds their store, so that each of them may be lost.

    Args:
        function: at a module's top level; raises to end all ranks.
        ranks: how many.
        args: picklable.
        outlives: whether the others go on without a rank that dies; else they are ended.

    Returns:
        What the call of the first rank returned that returned anything.

    Raises:
        RankFailed: a rank raised or died.
        KeyboardInterrupt: this process got SIGINT, SIGTERM or SIGHUP, and all ranks are gone.
    """
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        # Which is how torch knows that no rank has to hold the store.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    job = function, args
    with _interrupts() as interrupted:
        started = [
            _Rank(rank, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, job)
            for rank in range(ranks)
        ]
        try:
            interrupted.begin()
            return _watch(started, interrupted, outlives)
        finally:
            for rank in started:
                rank.end()


def alone(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `function` in this process, and tell what it raises as `launch` does.

    Raises:
        RankFailed: `function` raised what is no PifluxError; under torchrun that goes on as it is.
    """
    try:
        return function(*args, **kwargs)
    except PifluxError:
        raise
    except Exception as error:
        if is_joined():
            raise
        raise RankFailed(_raised(0, error)) from error


def _watch(ranks: Sequence[_Rank], interrupted: _Interrupts, outlives: bool) -> Any:
    """Until there is a result, or none to come."""
    first: _Rank | None = None  # that failed
    latest = math.inf
    while any(rank.runs for rank in ranks) and time.monotonic() < latest:
        multiprocessing.connection.wait([rank.process.sentinel for rank in ranks if rank.runs], 0.1)
        if interrupted.came:
            raise KeyboardInterrupt
        ended = [rank for rank in ranks if rank.runs and rank.look()]
        # Where one died, others raise for it: it is the one to tell of.
        for rank in sorted(ended, key=lambda rank: rank.ended_by_itself):
            if rank.failure is not None:
                first = first or rank
                if rank.ended_by_itself or not outlives:
                    raise RankFailed(first.failure)
            elif rank.result is not None and outlives:
                latest = min(latest, time.monotonic() + END_S)
    results = [rank.result for rank in ranks if rank.result is not None]
    if not results and first is not None:
        raise RankFailed(first.failure)
    return results[0] if results else None


class _Rank:
    """A rank's process.

    Attributes:
        runs: whether it has neither ended nor told how its call came out.
        result: what its call returned.
        failure: what to tell of it, if it failed.
        ended_by_itself: whether it raised, and didn't die or leave the others.
    """

    def __init__(self, rank: int, environment: dict[str, str], job: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.rank = rank
        self.runs, self.ended_by_itself = True, False
        self.result: Any = None
        self.failure: str | None = None
        self._told, theirs = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_rank, args=(os.getpid(), theirs, environment, *job), daemon=False
        )
        before = dict(os.environ)
        os.environ.update(environment)  # which libraries read as soon as they are imported
        try:
            self.process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()

    def look(self) -> bool:
        """Whether it has come to an end since."""
        try:
            if self._told.poll():
                kind, told = self._told.recv()
            elif self.process.is_alive():
                return False
            else:
                raise EOFError
        except (EOFError, OSError):
            self.process.join()
            self.failure = _died(self.rank, self.process.exitcode)
        else:
            if kind == "returned":
                self.result = told
            else:
                self.failure = told
                self.ended_by_itself = kind == "raised"
        self.runs = False
        return True

    def end(self) -> None:
        # One that has told all is let go, that it may free what it shares with others.
        self.process.join(0 if self.runs else END_S)
        self.process.kill()
        self.process.join()
        self._told.close()


class _Interrupts:
    """SIGINT, SIGTERM and SIGHUP of this process, which `_watch` looks at.

    They are blocked as long as ranks are being started, which inherit that, and none is lost: a
    terminal's Ctrl-C reaches ranks as well, which would print a traceback each while they import.
    """

    def __init__(self) -> None:
        self.came = False

    def begin(self) -> None:
        """All ranks have been started."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def _interrupts() -> Iterator[_Interrupts]:
    _track_resources()
    interrupts = _Interrupts()

    def take(*_: Any) -> None:
        interrupts.came = True

    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    handlers = {signum: signal.signal(signum, take) for signum in SIGNALS}
    try:
        yield interrupts
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _track_resources() -> None:
    """Starts what cleans up after ranks that are killed, and says nothing of what they left.

    Here, because it leaves the signals unblocked.
    """
    before = dict(os.environ)
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    try:
        resource_tracker.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _rank(
    parent: int, told: Any, environment: dict[str, str], function: Callable[..., Any], args: Any
) -> None:
    """A rank's life."""
    end_with(parent)
    # Python's own handler would run only after a collective that may never end. SIGINT stays
    # blocked: whoever started the rank gets a terminal's Ctrl-C as well, and ends it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.environ.update(environment)
    try:
        result = function(*args)
    except Excluded as error:
        told.send(("excluded", str(error)))
    except BaseException as error:
        told.send(("raised", _raised(int(environment["RANK"]), error)))
    else:
        told.send(("returned", result))
    told.close()


def end_with(parent: int) -> None:
    """Let the system end this process with the one that started it, however that ends."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before
        os._exit(1)


def name_process(name: str) -> None:
    """What the system's tools call this process: at most 15 letters."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode())


PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
"""Of linux/prctl.h."""


def _died(rank: int, exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"rank {rank} was killed by {name}; the others were ended"
    return f"rank {rank} ended with exit code {exitcode}"


def _raised(rank: int, error: BaseException) -> str:
    """What a rank met: piflux's own message, else one line with the place in the code."""
    if isinstance(error, PifluxError):
        return plain(str(error))
    if isinstance(error, SystemExit):
        return f"rank {rank} ended with exit code {error.code}"
    text = str(error)
    said = next((line for line in text.splitlines() if line.strip()), "")
    frames = [(x.filename, x.lineno, x.name) for x in traceback.extract_tb(error.__traceback__)]
    if explained := re.search(r"^ *Explanation: (.+)", text, re.MULTILINE):
        # Dynamo's: the first line names a kind, and the traceback ends in Dynamo.
        said = explained[1]
        of_model = text.partition("\nfrom user code:")[2]
        frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', of_model) or frames
    what = f"{type(error).__name__}: {said}" if said else type(error).__name__
    place = ""
    if frames:
        file, line, name = frames[-1]
        place = f" ({Path(file).name}:{line}, in {name})"
    return f"rank {rank} failed: {what}{place}; under torchrun the whole traceback is shown"


def join() -> torch.device:
    """Join the group that this rank's environment announces, if any; the rank's device.

    Raises:
        ValueError: the environment doesn't fit together; it names the variable.
        RankFailed: the rank has no GPU of its own, or the others did not come in time.
    """
    import torch

    from piflux.ranks import environment
    from piflux.ranks.groups import own_device, resolve_group

    if is_joined():
        environment.check()
    device = own_device()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        here = environment.count("LOCAL_WORLD_SIZE", 1, least=1)
        torch.set_num_threads(max(1, cores() // here))
    resolve_group(None)
    return device


def cores() -> int:
    """CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
