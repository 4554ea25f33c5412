"""Ctrl-C and SIGTERM end the program once, whatever code they fall into.

Python raises a signal's exception wherever the main thread is, and C++ that calls back into Python
(JAX while it traces and compiles, a destructor) drops it: the program would go on as if nothing had
happened. So a thread ends it some seconds later if the exception has not.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED = 130  # exit status, as a shell's
_SECONDS = 5.0
_arrived = threading.Event()  # of the last signal
_line = "interrupted"


def end_at_once() -> None:
    """Until `raise_interrupts` is called, Ctrl-C ends the process without a word more than that:
    while modules are loaded there is nothing to clean up. Main thread only."""
    signal.signal(signal.SIGINT, _end)


def raise_interrupts() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt, and ends the process some seconds later if that
    went astray. Main thread only."""
    print_no_dropped_signal()
    signal.signal(signal.SIGINT, _raise)


def tell_when_interrupted(what: str) -> None:
    """From here on the line of Ctrl-C says this, too: what is kept, and how to go on."""
    global _line
    _line = f"interrupted; {what}"


def interrupted_line() -> str:
    """The line that tells of Ctrl-C, without "error: "."""
    return _line


@contextmanager
def ending_on_sigterm(line: str) -> Iterator[None]:
    """Inside, SIGTERM ends the process at once with a line and status 0: there is nothing to clean
    up. Main thread only."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        os.write(2, f"SIGTERM: {line}\n".encode())
        os._exit(0)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def print_no_dropped_signal() -> None:
    """Print no traceback of a signal's exception that was dropped: the process ends all the same,
    with its one line."""
    before = sys.unraisablehook

    def hook(raised: Any) -> None:
        if not issubclass(raised.exc_type, KeyboardInterrupt | SystemExit):
            before(raised)

    sys.unraisablehook = hook


def end_within(status: int, line: str, seconds: float = _SECONDS) -> None:
    """End the process with this status, and a line, unless `ends_by_itself` is called before."""
    global _arrived
    arrived = _arrived = threading.Event()

    def wait() -> None:
        if not arrived.wait(seconds):
            os.write(2, f"{line}\n".encode())
            os._exit(status)

    threading.Thread(target=wait, name="interrupted", daemon=True).start()


def ends_by_itself() -> None:
    """The signal's exception has arrived where the program ends for it, and its line is told."""
    _arrived.set()


def _end(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"error: interrupted\n")
    os._exit(INTERRUPTED)


def _raise(number: int, frame: FrameType | None) -> None:
    end_within(INTERRUPTED, f"error: {_line}")
    raise KeyboardInterrupt
