"""A process that has imported what ranks need, and forks itself for each of them.

To import takes longer than most of what else a rank does before it can draw, and all ranks of a
host import the same. A fork has it at once, and shares the memory. The fork server holds no model
and has touched no GPU: what CUDA does to a process doesn't outlive a fork. Only the process that
started `multiprocessing`'s own can ask it, and it ends with that; this one outlives replicas.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NoReturn

from piflux.launch import name_process
from piflux.serving.messages import Load
from piflux.serving.processes import PROCESS_END_S
from piflux.serving.worker import attend, import_for

log = logging.getLogger(__name__)

IDLE_S = 120.0
"""How long a fork server is kept without a rank. A replica that was lost is followed sooner."""

ASKED_S = 5.0
"""How long one that has connected may take to ask for a rank."""

MAPS = Path("/proc/self/maps")
"""What this process has loaded. To reach for a GPU is to load CUDA's driver."""

WAITING = 128
"""That may ask for a rank while the fork server still imports."""


class ForkServer:
    """A handle on the fork server's process, which ends with the process that started it.

    Args:
        load: what ranks will be told to load.

    Attributes:
        place: where to ask for ranks: a socket that no other user reaches.
    """

    def __init__(self, load: Load) -> None:
        self.place = str(Path(tempfile.mkdtemp(prefix="piflux-")) / "ranks")  # of mode 0700
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(self.place)
            listening.listen(WAITING)
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(listening.fileno())],
                pass_fds=[listening.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.PIPE,
            )
        assert self._process.stdin is not None, "it is a pipe, which is left open as long as we are"
        with contextlib.suppress(BrokenPipeError):  # it has ended
            pickle.dump(load, self._process.stdin)
            self._process.stdin.flush()
        self.pid = self._process.pid

    def wait(self) -> int:
        """Wait for its end, which comes when it has had no rank for long; returns the exit code."""
        return self._process.wait()

    def kill(self) -> None:
        """End it at once. Its ranks go on."""
        self._process.kill()


class Forked:
    """A handle on a rank's process, which ends with the process that asked for it.

    Its connection is `piflux.serving.worker.attend`'s.

    Args:
        place: of the fork server.
        load: what the rank will be told to load.

    Raises:
        OSError: nobody listens there any more.
    """

    def __init__(self, place: str, load: Load) -> None:
        ours, theirs = socket.socketpair()
        self._control = socket.socket(socket.AF_UNIX)
        try:
            self._control.connect(place)
            # What the rank prints is to be found where its own process's is.
            socket.send_fds(self._control, [b"rank"], [theirs.fileno(), 1, 2])
        except BaseException:
            ours.close()
            self._control.close()
            raise
        finally:
            theirs.close()
        self.connection = Connection(ours.detach())
        self.connection.send(load)

    def kill(self) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self._control.shutdown(socket.SHUT_WR)

    def end(self) -> int | None:
        """Waits for its end, not for long, and gives the exit code; None if nobody knows it."""
        self._control.settimeout(PROCESS_END_S)
        try:
            told = self._told()
        except TimeoutError:  # one whose connection broke can't be told anything
            self.kill()
            self._control.settimeout(None)
            told = self._told()
        self._control.close()
        return int(told) if told else None

    def _told(self) -> bytes:
        try:
            return self._control.recv(16)
        except ConnectionError:
            return b""


def main() -> None:
    """As a process of its own, with its socket's descriptor as the first argument.

    What to import for is told by its standard input, with which it ends. A second argument has it
    import nothing.
    """
    name_process("piflux-forksrv")
    for number in (signal.SIGINT, signal.SIGTERM):  # which reach whole groups
        signal.signal(number, lambda *_: None)
    logging.basicConfig(format="%(levelname)s fork server: %(message)s")
    listening = socket.socket(fileno=int(sys.argv[1]))
    if len(sys.argv) == 2 and (reason := _import(pickle.load(sys.stdin.buffer))):
        log.warning("each rank imports for itself what it needs: %s", reason)
        # From the beginning: of what has been imported nothing is left.
        again = ["-m", "piflux.serving.fork_server", sys.argv[1], "imports nothing"]
        os.execv(sys.executable, [sys.executable, *again])
    # Nothing of it is garbage: ranks need not look through it, and so leave it shared.
    gc.collect()
    gc.freeze()
    serve(listening, sys.stdin.fileno(), attend, IDLE_S)


def _import(load: Load) -> str:
    """Import what ranks need; why it can't be forked, if so."""
    if sys.platform != "linux":
        return "libraries of this system can't be forked"
    # By this torch looks whether there is a GPU without reaching for it.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    try:
        import_for(load)
    except Exception:  # which each rank will meet, and tell of
        return f"it can't be imported\n{traceback.format_exc()}"
    if "libcuda.so" in MAPS.read_text():
        return "a library reaches for the GPU when it is imported"
    return ""


def serve(
    listening: socket.socket, ends: int, live: Callable[[Connection], None], idle_s: float
) -> None:
    """Fork a rank for everyone who asks; end those whose asker has ended, and tell how they ended.

    The socket's file and folder go with it.

    Args:
        listening: where they ask.
        ends: a pipe. Where nobody holds its other end any more this returns, and ranks go on.
        live: what a rank does.
        idle_s: without a rank for so long this returns.
    """
    ranks: dict[int, socket.socket] = {}  # by process
    killed: set[int] = set()
    woken, waking = socket.socketpair()
    waking.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # so that a byte is written
    signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
    while True:
        askers = [control for pid, control in ranks.items() if pid not in killed]
        ready = wait([listening, ends, woken, *askers], None if ranks else idle_s)
        if ends in ready or not ready and not ranks:
            break
        for pid, control in ranks.items():
            if control in ready:  # nobody has anything to say there: who asked has ended
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        if woken in ready:
            woken.recv(4096)
        if listening in ready:
            control = listening.accept()[0]
            born = _fork(control, live, [listening, woken, waking, *ranks.values()])
            if born is not None:
                ranks[born] = control
        for pid in list(ranks):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                killed.discard(pid)
                with ranks.pop(pid) as control, contextlib.suppress(OSError):
                    control.send(str(os.waitstatus_to_exitcode(status)).encode())
    place = Path(listening.getsockname())
    place.unlink()
    place.parent.rmdir()


def _fork(
    control: socket.socket, live: Callable[[Connection], None], others: list[socket.socket]
) -> int | None:
    """A rank's process; None if who asked has ended meanwhile."""
    control.settimeout(ASKED_S)
    try:
        told, given, *_ = socket.recv_fds(control, 16, 3)
    except OSError:
        told, given = b"", []
    if not told:
        control.close()
        return None
    pid = os.fork()
    if not pid:
        _live(control, live, others, given)
    for each in given:
        os.close(each)
    return pid


def _live(
    control: socket.socket,
    live: Callable[[Connection], None],
    others: list[socket.socket],
    given: list[int],
) -> NoReturn:
    """In a rank's process."""
    code = 1
    try:
        name_process("piflux-rank")
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for each in (control, *others):
            each.close()
        connection, *prints = given
        nothing = os.open(os.devnull, os.O_RDONLY)
        for ours, theirs in zip((0, 1, 2), (nothing, *prints), strict=True):
            os.dup2(theirs, ours)
            os.close(theirs)
        live(Connection(connection))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
