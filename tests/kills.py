"""Runs that are killed: start one as a process, send it a signal at some moment, compare what came
of it with the run nobody disturbed. For tests and for benchmarks/kills.py.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from engram_jax.checkpoint import run_record
from engram_jax.checkpoint.manager import Checkpointer
from engram_jax.data.run_data import open_data
from engram_jax.monitoring.metrics import read_metrics
from engram_jax.training.state import TrainState, abstract_state, build_training
from tests.runs import ROOT, Outcome, environment, small_config, small_run

STATUS = {signal.SIGKILL: {-9}, signal.SIGTERM: {0}, signal.SIGINT: {0}}


def timed(name: str) -> bool:
    """Whether a metric is a time, which no run repeats."""
    return name.split("/")[0] in TIMED


TIMED = ("time", "step_seconds", "tokens_per_second", "tokens_per_second_per_device", "goodput")


@dataclass(frozen=True)
class Kill:
    """One signal. step: of the last complete checkpoint at that moment. within_save: a checkpoint
    was being written. again: a second SIGTERM followed."""

    moment: str
    signal: str
    step: int
    within_save: bool
    again: bool
    status: int


def start(corpus: Path, workdir: Path, **overrides) -> subprocess.Popen:
    """The same command as a process of its own, which finds the programs that we compiled."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *small_run(corpus, workdir, **overrides)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def signal_when(
    process: subprocess.Popen,
    condition: Callable[[], bool],
    number: signal.Signals = signal.SIGKILL,
    *,
    again: bool = False,
) -> Outcome:
    """Send the signal while `condition()` holds; how the process ended and what it wrote.

    The process is halted while the condition is looked at once more, so it holds for certain.
    again: send the signal a second time, a moment later.
    Fails if the process ended by itself before.
    """
    while process.poll() is None:
        time.sleep(0.001)  # files are watched: there is nothing to wait for
        if not condition():
            continue
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if condition():
            break
        process.send_signal(signal.SIGCONT)
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    if again:
        time.sleep(0.02)
        process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode in STATUS[number], (process.returncode, out, err)
    assert number != signal.SIGTERM or "\nSIGTERM: " in f"\n{out}", (out, err)
    return Outcome(process.returncode, out, err)


def last_step(workdir: Path) -> int:
    """The last step in metrics.jsonl, 0 before there is one."""
    return max((record["step"] for record in read_metrics(workdir)), default=0)


def complete(workdir: Path) -> list[int]:
    """Steps with a complete checkpoint."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if name.isdigit())


def launches(workdir: Path) -> list[dict]:
    return run_record.read_launches(workdir / "run.json") if (workdir / "run.json").exists() else []


def starting(workdir: Path, rng: random.Random) -> Callable[[], bool]:
    """Some time in the first seconds of a launch: reading, restoring, compiling."""
    # Before that, Python is importing and SIGTERM ends it as it ends any program.
    end, lock = rng.uniform(0, 5), workdir / ".lock"
    earlier = lock.stat().st_mtime if lock.exists() else 0.0
    begun: list[float] = []

    def condition() -> bool:
        if not begun and lock.exists() and lock.stat().st_mtime > earlier:
            begun.append(time.monotonic())
        return bool(begun) and time.monotonic() > begun[0] + end

    return condition


def stepping(workdir: Path, rng: random.Random) -> Callable[[], bool]:
    """Some steps behind the last checkpoint, where others may have been before."""
    target = max(complete(workdir), default=0) + rng.randint(1, 8)
    begun = has_begun(workdir)
    return lambda: begun() and last_step(workdir) >= target


def saving(workdir: Path, rng: random.Random) -> Callable[[], bool]:
    """While a checkpoint is written, up to two later than the last."""
    begun = has_begun(workdir)
    last = max(complete(workdir), default=0) + rng.choice([0, 3, 6])

    def condition() -> bool:
        # What others left unfinished is removed before a launch counts as begun.
        return begun() and max(complete(workdir), default=0) >= last and being_written(workdir)

    return condition


def being_written(workdir: Path) -> bool:
    """Whether a checkpoint is under way, or was left unfinished: Orbax's temporary directory."""
    folder = workdir / "checkpoints"
    return folder.exists() and any("tmp" in path.name for path in folder.iterdir())


def has_begun(workdir: Path) -> Callable[[], bool]:
    """Whether the next launch has got as far as its first step."""
    earlier = len(launches(workdir))
    return lambda: len(launches(workdir)) > earlier


def final_state(corpus: Path, workdir: Path, step: int | None = None, **overrides) -> TrainState:
    config = small_config(corpus, **overrides)
    data = open_data(config, log=lambda line: None)
    program = build_training(config, data.addressing)
    with Checkpointer(workdir, addressing=data.addressing, read_only=True) as checkpointer:
        return checkpointer.restore(step, abstract_state(program)).state


def assert_same_run(corpus: Path, workdir: Path, expected: Path, **overrides) -> None:
    """Every logged number but times, and every array of the final checkpoint: parameters, router
    biases, tables, all moments."""
    ours, theirs = read_metrics(workdir), read_metrics(expected)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        names = {name for name in mine if not timed(name)}
        assert names == {name for name in other if not timed(name)}
        for name in names:
            np.testing.assert_array_equal(mine[name], other[name], err_msg=f"{name} {mine['step']}")
    assert complete(workdir) == complete(expected)
    found, wanted = (final_state(corpus, each, **overrides) for each in (workdir, expected))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert int(found.step) == complete(workdir)[-1]


def finished(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err
    return outcome


def campaign(
    corpus: Path, workdir: Path, count: int, rng: random.Random, **overrides
) -> Iterator[Kill]:
    """`count` launches, each killed at a random moment: a fifth while starting, two fifths each
    while stepping and saving; every second by SIGTERM, of which some are sent twice."""
    moments = ([starting, stepping, saving, stepping, saving] * count)[:count]
    numbers = ([signal.SIGKILL, signal.SIGTERM] * count)[:count]
    rng.shuffle(moments)
    for moment, number in zip(moments, numbers, strict=True):
        again = number == signal.SIGTERM and rng.random() < 0.5
        condition, begun, within = moment(workdir, rng), has_begun(workdir), [False]

        def at_last(condition=condition, begun=begun, within=within) -> bool:
            within[0] = begun() and being_written(workdir)  # not what the last launch left
            return condition()

        outcome = signal_when(start(corpus, workdir, **overrides), at_last, number, again=again)
        step = max(complete(workdir), default=0)
        yield Kill(moment.__name__, number.name, step, within[0], again, outcome.code)
