"""A rank's process: it loads the pipeline once, then draws what the engine tells it to."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from piflux.errors import CannotLoad, Excluded, PifluxError, RankFailed
from piflux.serving.messages import Command, Draw, End, Failed, Gone, Load, Stop, Told

log = logging.getLogger(__name__)


class Inbox:
    """What the engine told, taken apart: commands in their turn, and which calls are to stop.

    Attributes:
        stopped: number of the latest call that is to stop.
    """

    def __init__(self) -> None:
        self.stopped = -1
        self._commands: queue.SimpleQueue[Load | Draw | End] = queue.SimpleQueue()

    def put(self, command: Command) -> None:
        """From any thread."""
        if isinstance(command, Stop):
            self.stopped = max(self.stopped, command.number)
        else:
            self._commands.put(command)

    def next(self) -> Load | Draw | End:
        """Waits for it."""
        return self._commands.get()


def work(inbox: Inbox, tell: Callable[[Told], None]) -> None:
    """A worker's life, from `Load` to `End`.

    Raises:
        CannotLoad: the pipeline.
        Excluded: the other ranks went on without this one, which has to be started anew.
    """
    # Not before: a process that can't reach the engine need not load torch.
    from piflux.serving.artist import Artist

    load = inbox.next()
    if not isinstance(load, Load):
        return
    artist = Artist(load.source, load.inner)
    tell(artist.loaded())
    while isinstance(draw := inbox.next(), Draw):
        try:
            told: Told = artist.draw(draw, lambda: draw.number == inbox.stopped, tell)
        except Excluded:
            raise
        except Exception as error:
            told = _failed(draw, error)
        tell(told)


def _failed(draw: Draw, error: Exception) -> Failed:
    if isinstance(error, CannotLoad):
        return Failed(draw.number, "refused", str(error))
    if isinstance(error, RankFailed):
        log.warning("call %d was lost: %s", draw.number, error)
        return Failed(draw.number, "lost", str(error))
    log.exception("call %d failed", draw.number)
    return Failed(draw.number, "error", _said(error))


def _said(error: Exception) -> str:
    """The message if it is piflux's own, else one line."""
    if isinstance(error, PifluxError):
        return str(error)
    said = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said}"


def main() -> None:
    """As a process of its own, on the socket whose descriptor is the first argument."""
    from piflux.launch import end_with

    end_with(os.getppid())
    attend(Connection(int(sys.argv[1])))
    # What torch and its threads hold is the system's to free: nothing here has to be kept.
    sys.stderr.flush()
    os._exit(0)


def attend(connection: Connection) -> None:
    """A rank's life in a process of its own, which is to end with it.

    It is told what will be loaded, for which it imports what it can; then, at once or in a while,
    which rank it is and its GPU's place; and then commands.

    Args:
        connection: to the engine. Where that breaks the process ends.
    """
    # A terminal's Ctrl-C is the engine's to act on.
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach whole groups; the server says when
        signal.signal(number, lambda *_: None)
    inbox, sending = Inbox(), threading.Lock()
    first: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def read() -> None:
        try:
            for _ in range(2):
                first.put(connection.recv())
            while True:
                inbox.put(connection.recv())
        except (EOFError, OSError):  # the engine has ended, and takes all ranks with it
            os._exit(1)
        except Exception:  # such as a source that can't be imported here
            log.exception("what the engine says can't be read")
            os._exit(1)

    def tell(told: Told) -> None:
        with sending:
            connection.send(told)

    threading.Thread(target=read, daemon=True, name="piflux-commands").start()
    name = "a rank"
    with contextlib.suppress(BrokenPipeError):
        try:
            import_for(first.get())
            rank, gpu = first.get()
            name = f"rank {rank}"
            os.environ["LOCAL_RANK"] = str(gpu)
            logging.basicConfig(format=f"%(levelname)s {name}: %(message)s", force=True)
            work(inbox, tell)
        except Exception as error:
            tell(Gone(f"{name} failed: {_said(error)}"))
            raise


def import_for(load: Load) -> None:
    """What can be imported before a rank is needed, which is most of its start's work."""
    from torch._dynamo.backends.registry import lookup_backend

    import piflux.api
    import piflux.serving.artist  # noqa: F401
    from piflux.pipelines.arguments import SISTERS, sister_of
    from piflux.pipelines.folders import pipeline_class

    lookup_backend(load.inner)
    if load.inner == "inductor":
        import torch._inductor.compile_fx  # noqa: F401
    if isinstance(load.source, str):
        with contextlib.suppress(CannotLoad):  # of which the command tells
            kind = pipeline_class(load.source)
            for argument in SISTERS:
                sister_of(kind, argument)


if __name__ == "__main__":
    main()
