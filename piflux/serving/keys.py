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
    """Keys can't be read, or could be guessed."""


class Keys:
    """API keys, of which only hashes are kept.

    Args:
        keys: at least SHORTEST characters each, without spaces.

    Raises:
        WrongKeys: one of them is too short.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        found = list(keys)
        for number, key in enumerate(found, 1):
            if len(key) < SHORTEST:
                raise WrongKeys(
                    f"API key {number} has {len(key)} characters, and such can be guessed: take "
                    f"{SHORTEST} or more, as of `openssl rand -hex 24`"
                )
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
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise WrongKeys(f"{file} can't be read as API keys: {error}") from error
        of_file = [line for line in lines if line and not line.startswith("#")]
        if not of_file:
            raise WrongKeys(f"{file} holds no API key: write one a line")
        keys += of_file
    return Keys(keys) if keys else None


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
