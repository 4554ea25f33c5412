"""What is printed of a signal's exception that code which cannot raise has dropped."""

from __future__ import annotations

import sys

import pytest

from engram_jax.hardware.interrupts import print_no_dropped_signal


class Dropped:
    """Its destructor raises, which Python can only tell of."""

    def __init__(self, error: BaseException):
        self.error = error

    def __del__(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "told"), [(KeyboardInterrupt(), 0), (SystemExit(0), 0), (OSError(), 1)]
)
def test_a_dropped_signal_is_not_told_and_other_errors_are(error, told, monkeypatch):
    found = []
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: found.append(raised.exc_type))
    print_no_dropped_signal()
    Dropped(error)
    assert found == [type(error)] * told
