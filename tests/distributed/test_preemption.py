"""Who listens to SIGTERM and for how long, and that several processes stop at the same step."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading

import jax
import pytest

from engram_jax.distributed.preemption import Preempted, Preemption
from tests.runs import ROOT


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_notice_is_kept_until_the_loop_asks_and_the_handler_is_put_back():
    lines: list[str] = []
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Preemption(lines.append) as preemption, preemption.deferred():
            assert not preemption.agreed()
            sigterm()
            sigterm()
            assert preemption.agreed() and preemption.stopped
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        assert lines == []  # the loop says what it saved
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_notice_elsewhere_ends_with_status_0_and_a_line():
    lines: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end, Preemption(lines.append):
        sigterm()
    assert isinstance(end.value, Preempted) and end.value.code == 0
    assert len(lines) == 1 and lines[0].startswith("SIGTERM: ended")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_notice_that_comes_after_the_last_question_is_not_lost():
    def loop_that_just_ended(preemption: Preemption) -> None:
        with preemption, preemption.deferred():
            assert not preemption.agreed(wait=True)
            sigterm()

    with pytest.raises(Preempted):
        loop_that_just_ended(Preemption(lambda line: None))


def test_another_thread_leaves_the_signal_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def body() -> None:
        with Preemption() as preemption, preemption.deferred():
            seen.append((signal.getsignal(signal.SIGTERM), preemption.agreed()))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def test_asking_all_devices_transfers_nothing_implicitly():
    preemption = Preemption()
    with jax.transfer_guard("disallow"):
        assert not jax.device_get(preemption._ask())
        preemption._requested = True
        assert jax.device_get(preemption._ask())


# Loops like the training loop's, in one pair of processes. Process 0 gets the signal, at a moment
# that only it knows; one of the two is slower, so that without agreement they would stop apart.
LOOPS = """
import os, signal, sys, time
import jax
rank, port = (int(x) for x in sys.argv[1:])
jax.distributed.initialize(f"localhost:{port}", 2, rank)
from engram_jax.distributed.preemption import Preemption
step_fn = jax.jit(lambda x: x + 1)
for at, slow in ((0, 0), (30, 0), (30, 1), (59, 1)):
    with Preemption() as preemption, preemption.deferred():
        x, stopped = jax.device_put(0.0), None
        if rank == 0 and at == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        for step in range(10, 60):
            if preemption.agreed():
                stopped = step
                break
            x = step_fn(x)
            if rank == 0 and step == at:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01 if rank == slow else 0.0)
        if stopped is None and preemption.agreed(wait=True):
            stopped = 60
    print("stopped", stopped)
"""


def test_two_processes_stop_at_the_same_step():
    """The signal of one stops both: before the first step, one step after the next, at the end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOOPS, str(rank), str(port)],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    for out, _ in results:
        assert re.findall(r"stopped (\w+)", out) == ["10", "32", "32", "60"]
