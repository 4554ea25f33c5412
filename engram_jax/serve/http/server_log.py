"""The form of the server's log: one line each on standard error, which no client can forge."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any


class _Lines(logging.Formatter):
    """Time (UTC), level, and the message on one line; a traceback stands indented below it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        self.converter = time.gmtime

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return _one_line(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return "\n".join(
            f"    {_one_line(line)}" for line in super().formatException(ei).splitlines()
        )


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def log_to_stderr(level: str) -> None:
    """Send what the server and uvicorn log to standard error. level: the least serious one."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    for name in ("engram_jax.serve", "engram_jax.explore", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
