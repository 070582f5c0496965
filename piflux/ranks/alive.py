"""Whether another process runs, where that can be seen: on the same host."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Process:
    """What tells a process from all others, on this host and elsewhere.

    Attributes:
        host: with its boot, and the namespace of its processes. None: no Linux, and nothing is
            seen of it.
        pid: its number there.
        began: when it did; another process may get its number.
    """

    host: str | None
    pid: int
    began: str | None

    @classmethod
    def own(cls) -> Process:
        """This one."""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            space = os.readlink("/proc/self/ns/pid")
            host = f"{socket.gethostname()} {boot} {space}"
            return cls(host, os.getpid(), _stat(os.getpid())[1])
        return cls(None, os.getpid(), None)

    def runs(self, me: Process) -> Literal["yes", "no", "stopped", "unknown"]:
        """As `me` sees it; 'unknown' of another host's."""
        if self.host is None or self.host != me.host:
            return "unknown"
        try:
            state, began = _stat(self.pid)
        except OSError:
            return "no"
        if state in "ZX" or began != self.began:
            return "no"
        return "stopped" if state in "Tt" else "yes"


def _stat(pid: int) -> tuple[str, str]:
    """A process's state, one letter, and when it began."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]
