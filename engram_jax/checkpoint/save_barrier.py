"""The barrier between processes while a checkpoint is written; where one fails, none waits."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter

import jax

from engram_jax.distributed.consensus import PeerError, error_line
from engram_jax.distributed.jax_internals import key_value_store

_SAVES = itertools.count(1)  # processes begin the same saves in the same order


_SLICE = 0.5  # seconds between two looks at whether another process has failed


class SaveBarrier:
    """Where processes wait for each other during a save, in the background; an Orbax BarrierSyncFn.

    Orbax's own barrier knows only that a process is missing, after a timeout of 20 minutes. In this
    one a process that failed says so by `fail`, and those who wait raise PeerError within a second.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun("0")

    def begin(self) -> None:
        """A new save begins; nothing of the one before is under way. Every process calls it."""
        previous, number = self._prefix, next(_SAVES)
        with self._lock:
            self._begun(f"engram_jax/save/{number}/")
        if jax.process_count() > 1 and jax.process_index() == 0:
            key_value_store().key_value_delete(previous)

    def fail(self, error: BaseException) -> None:
        """This process cannot complete the save."""
        self._told = True
        if jax.process_count() > 1 and not isinstance(error, PeerError):
            rank = f"process {jax.process_index()} of {jax.process_count()}"
            key_value_store().key_value_set(
                f"{self._prefix}failed", f"{rank}: {error_line(error)}", allow_overwrite=True
            )

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Returns when every process has called it with this key as many times in this save.

        Raises PeerError as soon as a process has failed, in the background and once: Orbax then
        meets the others at one more barrier, to which all come. TimeoutError after `timeout_ms`.
        """
        if jax.process_count() == 1:
            return
        with self._lock:
            self._calls[key] += 1
            name = f"{self._prefix}{key}/{self._calls[key]}/"
        end = time.monotonic() + timeout_ms / 1000
        key_value_store().key_value_set(f"{name}{jax.process_index()}", "here")
        while not (_all_here(name) if jax.process_index() == 0 else _may_go(name)):
            if (
                threading.get_ident() != self._saver
                and not self._told
                and (failure := _get(f"{self._prefix}failed"))
            ):
                self._told = True
                raise PeerError(failure)
            if time.monotonic() > end:
                raise TimeoutError(f"other processes are not at {key} after {timeout_ms} ms")

    def _begun(self, prefix: str) -> None:
        self._prefix = prefix
        self._calls: Counter[str] = Counter()
        self._saver = threading.get_ident()
        self._told = False  # this process knows that the save has failed


def _get(key: str) -> str | None:
    try:
        return key_value_store().key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def _all_here(name: str) -> bool:
    """On process 0: whether all processes have come; looks often at first, then every `_SLICE`."""
    end, pause = time.monotonic() + _SLICE, 0.002
    while len(key_value_store().key_value_dir_get(name)) < jax.process_count():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    key_value_store().key_value_set(f"{name}go", "go")
    return True


def _may_go(name: str) -> bool:
    try:
        key_value_store().blocking_key_value_get(f"{name}go", int(_SLICE * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            return False
        raise
    return True
