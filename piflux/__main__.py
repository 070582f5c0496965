"""`piflux`, or `python -m piflux`: the command line, if what it needs is installed."""

import sys

from piflux.tools.interrupts import importing


def main() -> None:
    try:
        with importing():
            from piflux.tools.cli import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "piflux":
            raise
        sys.exit(
            f"piflux's command line needs the package {error.name!r}: pip install 'piflux[cli]'"
        )
    app()


if __name__ == "__main__":
    main()
