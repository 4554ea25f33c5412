"""A watchdog thread: reports its host when no step has ended for a long time."""

from __future__ import annotations

import faulthandler
import io
import os
import sys
import threading
import time
import traceback
from typing import NamedTuple, TextIO

from engram_jax.monitoring.provenance import process_name

COMPILING = 10.0  # how much more patience the first step gets, and an evaluation: they compile
STATUS = 3  # exit status of a process that ended itself because it hung


class _Mark(NamedTuple):
    step: int
    doing: str
    since: float
    patience: float


class Watchdog:
    """Context. seconds: how long a step may take; 0 switches it off.

    step: the one the launch starts from. exits: end the process (status 3) after the report, so
    that what supervises it can start it again; no checkpoint is written.
    stream: default standard error, where it is a file: the stacks are written by faulthandler.
    """

    def __init__(
        self, seconds: float, *, step: int, exits: bool = False, stream: TextIO | None = None
    ):
        self._seconds, self._exits = seconds, exits
        self._stream = stream
        self._mark = _Mark(step, "compiling and the first step", time.monotonic(), COMPILING)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def finished(self, step: int) -> None:
        """`step` updates are applied, and the host has seen it."""
        self._mark = _Mark(step, "training", time.monotonic(), 1.0)

    def doing(self, what: str, *, patience: float = COMPILING) -> None:
        """The time starts anew, for something else than a step."""
        self._mark = _Mark(self._mark.step, what, time.monotonic(), patience)

    def __enter__(self) -> Watchdog:
        self._mark = self._mark._replace(since=time.monotonic())
        if self._seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        reported, times = self._mark, 1
        while not self._end.wait(min(self._seconds / 4, 5.0)):
            mark = self._mark
            if mark is not reported:
                reported, times = mark, 1
            silent = time.monotonic() - mark.since
            if silent >= times * mark.patience * self._seconds:
                times *= 2  # again after twice the time: a log that is read
                self._report(mark, silent)

    def _report(self, mark: _Mark, silent: float) -> None:
        stream = self._stream or sys.stderr
        ends = "; ending the process (train.hang_exit)" if self._exits else ""
        print(
            f"hang: {process_name()}: no step has ended for {silent:.3g} s; the last was step"
            f" {mark.step}, now {mark.doing}{ends}; the stacks of all threads follow",
            file=stream,
            flush=True,
        )
        _dump(stream)
        if self._exits:
            os._exit(STATUS)  # the main thread may never return, so nothing can be unwound


def _dump(stream: TextIO) -> None:
    try:
        faulthandler.dump_traceback(stream, all_threads=True)
    except (io.UnsupportedOperation, AttributeError):  # a notebook's stream is no file
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        print("".join(traceback.format_stack(frame)), file=stream, flush=True)
