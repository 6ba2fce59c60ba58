"""One JSON object a line on stderr: what happened, for whom, how long it took; never what was computed."""

import json
import logging
import secrets
import sys
import traceback
from datetime import datetime, timezone
from typing import Any, TextIO

LOGGER = logging.getLogger("cipherlm.serving")


def log(event: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Log an event with its figures and names."""
    LOGGER.log(level, event, extra={"fields": fields})


def log_exception(event: str, error: BaseException, **fields: Any) -> str:
    """Log an error of ours: its type and where it was raised. Returns the reference under which it is found.

    Not its text and not the values in its frames: those may be a client's. The reference is all that a client
    is told, an error's own if it has one already, such as from another machine's log.
    """
    reference = str(getattr(error, "reference", None) or secrets.token_hex(4))
    log(event, level=logging.ERROR, reference=reference, **fields, **_where(error))
    return reference


class JsonFormatter(logging.Formatter):
    """Formats our events, and what libraries log, as JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
        }
        if record.name == LOGGER.name:
            entry |= {"event": record.msg, **getattr(record, "fields", {})}
        else:
            entry |= {"event": "library", "logger": record.name, "message": record.getMessage()}
        if record.exc_info and record.exc_info[1]:
            entry |= _where(record.exc_info[1])
        return json.dumps(entry, default=str)


def log_to(stream: TextIO | None = None) -> logging.Handler:
    """Send our events, and the warnings of the HTTP server, to a stream (stderr)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name, level in (
        (LOGGER.name, logging.INFO),
        ("uvicorn", logging.WARNING),
        ("asyncio", logging.WARNING),
    ):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
    return handler


def _where(error: BaseException) -> dict[str, Any]:
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "error": type(error).__name__,
        "stack": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-12:]],
    }
