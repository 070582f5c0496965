"""`piflux`, or `python -m piflux`: the command line, if what it needs is installed."""

import os
import signal
import sys
from typing import Any

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def main() -> None:
    # Importing takes seconds, and in it an exception may be swallowed.
    takes_interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if takes_interrupts:
        signal.signal(signal.SIGINT, _end)
    try:
        from piflux.tools.cli import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "piflux":
            raise
        sys.exit(
            f"piflux's command line needs the package {error.name!r}: pip install 'piflux[cli]'"
        )
    if takes_interrupts:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    app()


def _end(*_: Any) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(sys.stderr.fileno(), b"interrupted\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
