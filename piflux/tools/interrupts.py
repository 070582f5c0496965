"""Ctrl-C while modules are imported. Imports nothing of weight."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from piflux.errors import INTERRUPTED


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """While it lasts, Ctrl-C ends the process at once.

    Importing torch takes seconds, and an exception that is raised in it may be swallowed. A process
    that ignores interrupts, as a shell's background jobs do, goes on ignoring them.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: Any) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(sys.stderr.fileno(), b"interrupted\n")
    os._exit(INTERRUPTED)
