"""A hang is reported with its host, its step and the stack that hangs."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

from engram_jax.monitoring.hang_watchdog import COMPILING, STATUS, Watchdog
from tests.runs import ROOT


def reports(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith("hang: ")]


def block_until(path: Path, count: int) -> None:
    """What the stack must show: the main thread waits here."""
    deadline = time.monotonic() + 60
    while len(reports(path)) < count and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_blocked_step_is_reported_with_its_stack(tmp_path):
    path = tmp_path / "err"
    with path.open("w") as stream, Watchdog(0.1, step=40, stream=stream) as watchdog:
        watchdog.finished(41)
        block_until(path, 2)  # and again, after twice the time
        watchdog.finished(42)
    first, second = reports(path)
    assert f"process 0 of 1 on host {socket.gethostname()}" in first
    assert "the last was step 41, now training" in first
    seconds = [float(line.split("for ")[1].split(" s")[0]) for line in (first, second)]
    assert seconds[0] >= 0.1 and seconds[1] >= 0.2
    text = path.read_text()
    assert "in block_until" in text and "most recent call first" in text


def test_the_first_step_and_pauses_have_more_patience(tmp_path):
    path = tmp_path / "err"
    with path.open("w") as stream, Watchdog(0.05, step=0, stream=stream) as watchdog:
        block_until(path, 1)
        watchdog.finished(1)
        watchdog.doing("evaluating or saving")
        block_until(path, 2)
    compiling, saving = reports(path)
    assert "the last was step 0, now compiling and the first step" in compiling
    assert "the last was step 1, now evaluating or saving" in saving
    for line in (compiling, saving):
        assert float(line.split("for ")[1].split(" s")[0]) >= 0.05 * COMPILING


def test_steps_that_end_in_time_and_a_watchdog_that_is_off_say_nothing(tmp_path):
    path = tmp_path / "err"
    with path.open("w") as stream:
        with Watchdog(5, step=0, stream=stream) as watchdog, Watchdog(0, step=0, stream=stream):
            for step in range(20):
                time.sleep(0.01)
                watchdog.finished(step)
    assert path.read_text() == ""


def test_a_hang_that_holds_the_interpreters_lock_is_reported():
    """In C code that keeps it, no thread of Python runs: faulthandler's own does."""
    code = (
        "import ctypes\nfrom engram_jax.monitoring.hang_watchdog import Watchdog\n"
        "with Watchdog(0.2, step=7) as dog:\n dog.finished(8)\n"
        " ctypes.PyDLL(None).usleep(1_500_000)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0
    assert done.stderr.startswith("Timeout (0:00:00.4")
    assert 'File "<string>", line 5 in <module>' in done.stderr


def test_a_process_that_hangs_ends_if_asked_to():
    code = (
        "import time\nfrom engram_jax.monitoring.hang_watchdog import Watchdog\n"
        "with Watchdog(0.1, step=7, exits=True) as dog:\n dog.finished(8)\n time.sleep(100)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == STATUS
    assert "the last was step 8, now training; ending the process" in done.stderr
    assert 'File "<string>", line 5 in <module>' in done.stderr
