"""`piflux`, or `python -m piflux`: the command line, if what it needs is installed."""

import sys

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def main() -> None:
    try:
        from piflux.cli import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "piflux":
            raise
        sys.exit(
            f"piflux's command line needs the package {error.name!r}: pip install 'piflux[demo]'"
        )
    except KeyboardInterrupt:  # importing takes seconds
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    app()


if __name__ == "__main__":
    main()
