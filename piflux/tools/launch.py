"""Starting one process a rank on this host, and ending them all with the first that fails.

Imports torch only where ranks are started or joined: arguments are checked before.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

import piflux.errors
from piflux.errors import RankFailed, plain

if TYPE_CHECKING:
    import torch

START_S = 2.0
"""How long an interrupt waits for ranks that are being started."""


def is_joined() -> bool:
    """Whether torchrun, or something with its environment, started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this process is the one rank that speaks, or no rank at all."""
    return os.environ.get("RANK", "0") == "0"


def launch(function: Callable[..., Any], ranks: int, *args: Any) -> Any:
    """Call `function(*args)` in new processes of this host, each with torchrun's environment.

    Args:
        function: at a module's top level; raises to end all ranks.
        ranks: how many.
        args: picklable.

    Returns:
        What rank 0's call returned.

    Raises:
        RankFailed: a rank raised or died.
        KeyboardInterrupt: this process got SIGINT, SIGTERM or SIGHUP, and all ranks are gone.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # They report each signal and death as warnings; here those become one message.
    for launcher in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(launcher).addHandler(logging.NullHandler())
        logging.getLogger(launcher).propagate = False
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3")
    # A rank that is ended by a signal leaves tqdm's lock behind, which the tracker then frees.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGQUIT",  # the others are ours, below,
    )
    try:
        with _interrupts_as_sigterm(ranks):
            return elastic_launch(config, _rank)(function, args)[0]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise RankFailed(_tell(rank, failure)) from None
    except SignalException:
        raise KeyboardInterrupt from None


@contextlib.contextmanager
def _interrupts_as_sigterm(ranks: int) -> Iterator[None]:
    """Take SIGINT for SIGTERM, and start processes that have it blocked.

    A terminal's Ctrl-C reaches the ranks as well; while they import, each would print a traceback.
    So would a rank whose start is interrupted: signals wait until all are there.
    """
    # Started here, because it leaves the signal unblocked.
    resource_tracker.ensure_running()
    ended, interrupted, ready = threading.Event(), threading.Event(), threading.Event()
    others = set(multiprocessing.active_children())

    def started() -> list[Any]:
        return [child for child in multiprocessing.active_children() if child not in others]

    def wait() -> None:
        # A signal needs a thread that takes it; Python's handler then runs in the main one.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        interrupted.wait()
        latest = time.monotonic() + START_S
        while len(started()) < ranks and time.monotonic() < latest:
            if ended.wait(0.01):
                return
        if not ended.is_set():
            ready.set()
            os.kill(os.getpid(), signal.SIGTERM)

    def take(signum: int, _: Any) -> None:
        # In the midst of a start it would leave a rank that prints a traceback, too.
        if ready.is_set():
            raise SignalException("ranks are ended", signal.Signals(signum))
        interrupted.set()

    from torch.distributed.elastic.multiprocessing.api import SignalException

    ours = (signal.SIGTERM, signal.SIGHUP)
    handlers = {signum: signal.signal(signum, take) for signum in ours}
    handlers[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    try:
        yield
    finally:
        ended.set()
        interrupted.set()
        waiter.join()
        # The launcher knows of its ranks only when all have started.
        for child in started():
            child.kill()
            child.join()
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _rank(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    # Python's own handler would run only after a collective that may never end. SIGINT stays
    # blocked: whoever started the rank gets a terminal's Ctrl-C as well, and ends it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return function(*args)


def _tell(rank: int, failure: Any) -> str:
    """What a rank met: piflux's own message, else one line with the place in the code."""
    if failure.exitcode < 0:
        return f"rank {rank} was killed by {failure.signal_name()}; the others were ended"
    recorded = failure.error_file_data.get("message", "")
    if not isinstance(recorded, dict):
        return f"rank {rank} ended with exit code {failure.exitcode}"
    kind, _, text = recorded["message"].partition(": ")
    if hasattr(piflux.errors, kind):
        return plain(text)
    what = next((x for x in recorded["message"].splitlines() if x.strip()), kind)
    frames = re.findall(
        r'File "([^"]+)", line (\d+), in (\S+)', recorded["extraInfo"]["py_callstack"]
    )
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
