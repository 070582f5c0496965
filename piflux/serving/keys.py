"""Who may ask."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from piflux.errors import PifluxError

VARIABLE = "PIFLUX_API_KEYS"
"""The environment variable with keys, parted by commas or spaces."""

SHORTEST = 16
"""Characters of a key. Fewer can be guessed."""


class WrongKeys(PifluxError):
    """Keys can't be read, or could be guessed.

    Attributes:
        file: where they stand; None for the environment, or if they stand nowhere.
    """

    def __init__(self, message: str, file: Path | None = None) -> None:
        super().__init__(message)
        self.file = file


class Keys:
    """API keys, of which only hashes are kept.

    Args:
        keys: at least SHORTEST characters each, without spaces.

    Raises:
        WrongKeys: one of them is too short.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        found = list(keys)
        _check_lengths(found)
        self._hashes = tuple(_hash(key) for key in found)

    def __len__(self) -> int:
        return len(self._hashes)

    def holder(self, key: str) -> str | None:
        """A name for whoever holds the key, None if it is none of these.

        All are compared, each in a time that says nothing of where they differ.
        """
        asked = _hash(key)
        found = [known for known in self._hashes if hmac.compare_digest(known, asked)]
        return f"key-{found[0].hex()[:8]}" if found else None


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> Keys | None:
    """Keys of a file, one a line, and of the environment; None if there are none.

    Args:
        file: blank lines and what begins with '#' is left aside.
        environment: see VARIABLE.

    Raises:
        WrongKeys: the file can't be read, holds none, or a key is too short.
    """
    keys = [key for key in re.split(r"[,\s]+", environment.get(VARIABLE, "")) if key]
    _check_lengths(keys, f"{VARIABLE}: ")
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise WrongKeys(f"{file} can't be read as API keys: {why}", file) from error
        of_file = [line for line in lines if line and not line.startswith("#")]
        if not of_file:
            raise WrongKeys(f"{file} holds no API key: write one a line", file)
        _check_lengths(of_file, f"{file}: ", file)
        keys += of_file
    return Keys(keys) if keys else None


def _check_lengths(keys: Iterable[str], where: str = "", file: Path | None = None) -> None:
    """Raises WrongKeys if one is too short."""
    for number, key in enumerate(keys, 1):
        if len(key) < SHORTEST:
            raise WrongKeys(
                f"{where}API key {number} has {len(key)} characters, and such can be guessed: "
                f"take {SHORTEST} or more, as of `openssl rand -hex 24`",
                file,
            )


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
