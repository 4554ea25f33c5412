"""Runs an experiment: one process after another trains a point each, until all are done.

What a process prints goes to the sweep's `logs/`. A run is taken by locking its file in `locks/`,
so several sweeps, on one or more machines, can share a folder. The lock is inherited by the process
that trains: if the sweep is killed, that process goes on alone, and another sweep waits for it.
SIGTERM and ctrl-C end the sweep: the running process gets SIGTERM, saves its state and ends, and
the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import datetime
import resource
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TextIO

from engram_jax.checkpoint.workdir import try_lock
from engram_jax.config.errors import UserError
from engram_jax.lab.experiment import Launch
from engram_jax.lab.plan import Plan, add_attempt, attempts, held_out_loss, log_file
from engram_jax.monitoring.metrics import read_metrics

_LOOK = 1.0  # seconds between looks at a running process
_USER_ERROR = 2  # exit status of a program that ends with one line
NOT_FINITE = ": not finite; the state before this step"  # in that line: run/loop.py
_WAIT = 10.0  # seconds between looks at what other sweeps run


class State(Enum):
    OPEN = "open"
    RUNNING = "running"
    ELSEWHERE = "running elsewhere"
    DONE = "done"
    DIVERGED = "diverged"
    FAILED = "failed"


ENDED = (State.DONE, State.DIVERGED)  # as it should: it would end the same again


@dataclass
class Progress:
    """How far a run is. loss: held out, of one that is done. step, steps: of one that is running.
    seconds: its process's, so far or in all. why: of one that failed or diverged."""

    state: State = State.OPEN
    loss: float | None = None
    step: int = 0
    steps: int = 0
    seconds: float | None = None
    why: str = ""


@dataclass
class Sweep:
    """A sweep on this machine.

    command: the program, to which a run's flags are added. file: the experiment's. overrides: keys
    that the command line set for every run. show: told of every change; finished: of every run that
    ended well.
    """

    plan: Plan
    command: Sequence[str]
    file: str
    overrides: Mapping[str, str]
    show: Callable[[Sweep], None]
    finished: Callable[[], object]
    progress: dict[str, Progress] = field(default_factory=dict)
    rates: dict[str, float] = field(init=False)
    stopping: bool = False
    _process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.rates = self.plan.chosen_rates()

    def run(self) -> bool:
        """Run what is not done; whether all of it is done, or has diverged, now.

        The trials of learning rates come first. What others run is waited for, and meanwhile the
        runs of the families that have their rate are made.
        """
        for folder in ("logs", "locks"):
            (self.plan.folder / folder).mkdir(parents=True, exist_ok=True)
        with self._signals():
            self._until_settled()
        self.show(self)
        families = {point.family for point in self.plan.points}
        return families == set(self.rates) and all(
            self.of(launch).state in ENDED for launch in self._wanted()
        )

    def _wanted(self) -> tuple[Launch, ...]:
        return (*self.plan.trials(), *self.plan.runs(self.rates))

    def _until_settled(self) -> None:
        """Run every launch that is open, and wait for those that others run."""
        while not self.stopping:
            self.rates = self.plan.chosen_rates()
            launches = self._wanted()
            for launch in launches:
                self._look(launch)
            self.show(self)
            states = [self.of(launch).state for launch in launches]
            if State.OPEN in states:
                self._take(launches[states.index(State.OPEN)])
            elif State.ELSEWHERE in states:
                self._sleep(_WAIT)
            elif self.plan.chosen_rates() == self.rates:
                return

    def of(self, launch: Launch) -> Progress:
        return self.progress.setdefault(launch.name, Progress())

    def arguments(self, launch: Launch) -> list[str]:
        """The flags of a run, as of one that is started by hand."""
        overrides = [f"--config.{key}={value}" for key, value in self.overrides.items()]
        workdir = f"--workdir={self.plan.workdir(launch)}"
        return [f"--config={self.file}:{launch.name}", *overrides, workdir]

    def _look(self, launch: Launch) -> None:
        """Note what the run's folder says, unless this sweep has seen it end."""
        mine = self.of(launch)
        if mine.state in (*ENDED, State.FAILED) or self._ended(launch):
            return
        lock = self._lock(launch)
        mine.state = State.ELSEWHERE if lock is None else State.OPEN
        if lock is not None:
            lock.close()

    def _ended(self, launch: Launch) -> bool:
        """Whether the run's folder says that it needs no process, or can have none; noted."""
        mine = self.of(launch)
        try:
            losses = self.plan.losses(launch)
            if losses is not None:
                mine.state, mine.loss = State.DONE, held_out_loss(losses)
            elif self.plan.diverged(launch):
                mine.state = State.DIVERGED
                mine.why = str(attempts(self.plan.folder, launch)[-1]["why"])
            else:
                return False
        except UserError as error:
            mine.state, mine.why = State.FAILED, str(error)
        return True

    def _lock(self, launch: Launch) -> TextIO | None:
        return try_lock(self.plan.folder / "locks" / launch.name)

    def _take(self, launch: Launch) -> None:
        """Run one launch to its end, unless another sweep was faster."""
        lock = self._lock(launch)
        if lock is None:
            return
        with lock:
            if not self._ended(launch):  # between the look and the lock
                self._train(launch, lock)

    def _train(self, launch: Launch, lock: TextIO) -> None:
        mine, command = self.of(launch), [*self.command, *self.arguments(launch)]
        mine.state, mine.steps = State.RUNNING, self.plan.config(launch).train.steps
        started, clock = datetime.datetime.now(datetime.UTC), time.monotonic()
        processor = _children_seconds()
        log = log_file(self.plan.folder, launch)
        with log.open("ab") as out:
            out.write(f"--- {started:%F %T} UTC: {shlex.join(command)}\n".encode())
            out.flush()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                pass_fds=(lock.fileno(),),
                start_new_session=True,  # ctrl-C is for the sweep, which passes SIGTERM on
            )
            if self.stopping:  # the signal came while it was started
                self._process.terminate()
            while self._process.poll() is None:
                mine.seconds = time.monotonic() - clock
                mine.step = last_step(self.plan.workdir(launch))
                self.show(self)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_LOOK)
            status, self._process = self._process.returncode, None
        mine.seconds = time.monotonic() - clock
        last = log.read_text(errors="replace").strip().splitlines()[-1]
        diverged = status == _USER_ERROR and NOT_FINITE in last
        if diverged:
            mine.state, mine.why = State.DIVERGED, last
        elif status == 0 and self._ended(launch):
            pass
        elif self.stopping:
            mine.state = State.OPEN
        else:  # status 0: it got a SIGTERM that was not the sweep's
            mine.state, mine.why = State.FAILED, f"exit status {status}: {last}"
        attempt: dict[str, Any] = {
            "time": started.isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "seconds": mine.seconds,
            "cpu_seconds": _children_seconds() - processor,
            "status": status,
            "command": shlex.join(command),
            "diverged": diverged,
        }
        add_attempt(self.plan.folder, launch, {**attempt, "why": mine.why})
        if mine.state in ENDED:
            self.finished()

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.stopping and time.monotonic() < end:
            time.sleep(0.2)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT: pass SIGTERM on, once, and start nothing more."""

        def stop(number: int, frame: Any) -> None:
            if not self.stopping and self._process is not None:
                self._process.terminate()
            self.stopping = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _children_seconds() -> float:
    """Processor time of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def last_step(workdir: Path) -> int:
    """The last step that a run has logged."""
    return max((int(record["step"]) for record in read_metrics(workdir)), default=0)
