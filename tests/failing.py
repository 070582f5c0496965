"""What ranks are started with that fail; apart, so that they need import nothing else."""

from typing import NoReturn

from piflux.errors import CannotSave


def fails() -> NoReturn:
    raise ValueError("on purpose")


def says() -> NoReturn:
    raise CannotSave("the folder is full: empty it")
