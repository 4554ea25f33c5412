"""A watchdog thread: reports its host when no step has ended for a long time.

A thread of Python cannot run while another one holds the interpreter's lock in C code. For that
case faulthandler's own thread, which needs no lock, writes the stacks somewhat later, under
"Timeout".
"""

from __future__ import annotations

import contextlib
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
    that what supervises it can start it again; no checkpoint is written. (With status 1 where the
    lock is held.)
    stream: default standard error, where it is a file: the stacks are written by faulthandler.
    """

    def __init__(
        self, seconds: float, *, step: int, exits: bool = False, stream: TextIO | None = None
    ):
        self._seconds, self._exits = seconds, exits
        self._stream = stream
        self._interval, self._armed = min(seconds / 4, 5.0), (0.0, 0.0)
        self._mark = _Mark(step, "compiling and the first step", time.monotonic(), COMPILING)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def finished(self, step: int) -> None:
        """`step` updates are applied, and the host has seen it."""
        self._mark = _Mark(step, "training", time.monotonic(), 1.0)
        self._arm()

    def doing(self, what: str, *, patience: float = COMPILING) -> None:
        """The time starts anew, for something else than a step."""
        self._mark = _Mark(self._mark.step, what, time.monotonic(), patience)
        self._arm()

    def __enter__(self) -> Watchdog:
        self._mark = self._mark._replace(since=time.monotonic())
        if self._seconds > 0:
            self._thread.start()
            self._arm()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _arm(self) -> None:
        """Let faulthandler report from now on; at most four times in `seconds`."""
        now, patience = time.monotonic(), self._mark.patience
        recent = patience == self._armed[1] and now - self._armed[0] < self._interval
        if recent or not self._thread.is_alive():
            return
        self._armed = now, patience
        # Later than the thread, which then takes it back: between two looks, and two armings.
        after = patience * self._seconds + 4 * self._interval
        with contextlib.suppress(io.UnsupportedOperation, AttributeError):
            stream = self._stream or sys.stderr
            faulthandler.dump_traceback_later(after, exit=self._exits, file=stream)

    def _watch(self) -> None:
        reported, times = self._mark, 1
        while not self._end.wait(self._interval):
            mark = self._mark
            if mark is not reported:
                reported, times = mark, 1
            silent = time.monotonic() - mark.since
            if silent >= times * mark.patience * self._seconds:
                times *= 2  # again after twice the time: a log that is read
                faulthandler.cancel_dump_traceback_later()
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
