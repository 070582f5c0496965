"""Log lines for programs: one JSON object each."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from typing import Any, TextIO

LOGGER = logging.getLogger("piflux.serving")


def tell(
    event: str, *, level: int = logging.INFO, error: BaseException | None = None, **fields: Any
) -> None:
    """Write a line.

    Args:
        event: what happened, in one word.
        level: of logging.
        error: whose traceback is written, too.
        fields: what JSON can say.
    """
    LOGGER.log(level, event, extra={"fields": fields}, exc_info=error)


class Lines(logging.Formatter):
    """A record as a line of JSON: time, level, event, and the fields of `tell`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(
                timespec="milliseconds"
            ),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        if record.name != LOGGER.name:
            line["logger"] = record.name
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def to(stream: TextIO) -> None:
    """From now on this process's log lines, also those of its libraries, go to `stream`."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Lines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    LOGGER.setLevel(logging.INFO)
