"""Keeps the processes of a run together: an error on one ends all of them with the same line."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from engram_jax.config.errors import UserError
from engram_jax.distributed.jax_internals import key_value_store

T = TypeVar("T")

_GATHERS = itertools.count(1)
_DAYS = 7 * 24 * 3600 * 1000  # milliseconds


class PeerError(Exception):
    """Another process failed; the message says which and why."""


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order. Every process calls it."""
    if jax.process_count() == 1:
        return [text]
    # Wait as long as the others live: one may be reading text for hours.
    key_value_store().wait_at_barrier(f"engram_jax/gather/{next(_GATHERS)}", _DAYS)
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.zeros(max(1, sizes.max()), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def agree(work: Callable[[], T]) -> T:
    """`work()`, called on every process; fails on all of them if it fails on any.

    Raises UserError with the message of the first process that failed (with one process: the error
    itself).
    """
    if jax.process_count() == 1:
        return work()
    value: Any = None
    error: Exception | None = None
    try:
        value = work()
    except Exception as caught:
        error = caught
    lines = gather("" if error is None else error_line(error))
    failed = [rank for rank, line in enumerate(lines) if line]
    if not failed:
        return value
    where = "" if len(failed) == len(lines) else f" (on process {failed[0]} of {len(lines)})"
    raise UserError(lines[failed[0]] + where) from error


def error_line(error: BaseException) -> str:
    """An error's message; for errors other than UserError one line of at most 300 characters."""
    if isinstance(error, UserError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])[:300]
