"""What a running sweep shows: a table that is drawn again, or plain lines where none can be."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import TextIO

from engram_jax.lab.experiment import Launch, text_of
from engram_jax.lab.runner import ENDED, Progress, State, Sweep

_SHOWN = (*ENDED, State.FAILED, State.RUNNING, State.ELSEWHERE)


class Screen:
    """Shows a sweep's state on `stream`."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stdout
        self._live = self.stream.isatty()
        self._height = 0
        self._said: dict[str, State] = {}

    def show(self, sweep: Sweep) -> None:
        if self._live:
            size = shutil.get_terminal_size()
            lines = [line[: size.columns - 1] for line in table(sweep, size.lines - 2)]
            up = f"\x1b[{self._height}F\x1b[J" if self._height else ""
            print(f"{up}{chr(10).join(lines)}", file=self.stream, flush=True)
            self._height = len(lines)
            return
        for name, progress in sweep.progress.items():
            if progress.state in _SHOWN and self._said.get(name) is not progress.state:
                print(f"{line(name, progress)}; {summary(sweep)}", file=self.stream, flush=True)
            self._said[name] = progress.state


def table(sweep: Sweep, height: int) -> list[str]:
    """The newest `height` lines: every run that was begun, and how much is left."""
    shown = [
        line(name, progress)
        for name, progress in sweep.progress.items()
        if progress.state in _SHOWN
    ]
    return [*shown[-max(height - 2, 1) :], rates(sweep), summary(sweep)]


def line(name: str, progress: Progress) -> str:
    """A run in a line."""
    what = progress.state.value
    if progress.state is State.RUNNING:
        what = f"step {progress.step} of {progress.steps}"
    elif progress.loss is not None:
        what = f"{what}, held-out loss {progress.loss:.4f}"
    elif progress.why:
        what = f"{what}: {progress.why}"
    took = "" if progress.seconds is None else f", {duration(progress.seconds)}"
    return f"{name}: {what}{took}"


def rates(sweep: Sweep) -> str:
    """The learning rates in use."""
    if not sweep.rates:
        return "learning rates: being tried"
    return "learning rates: " + ", ".join(f"{k} {text_of(r)}" for k, r in sweep.rates.items())


def summary(sweep: Sweep) -> str:
    """How much is done, and how long the rest takes."""
    wanted = all_of(sweep)
    states = [_state(sweep, launch) for launch in wanted]
    failed = states.count(State.FAILED)
    diverged = states.count(State.DIVERGED)
    parts = [f"{states.count(State.DONE)} of {len(wanted)} done"]
    parts += [f"{diverged} diverged"] if diverged else []
    parts += [f"{failed} failed"] if failed else []
    left = seconds_left(sweep)
    parts += [f"about {duration(left)} left"] if left else []
    return ", ".join(parts)


def all_of(sweep: Sweep) -> Sequence[Launch]:
    """The trials and the runs. While rates are being tried, each family's first stands for its
    best, which is one of the trials already."""
    plan, tried = sweep.plan, sweep.plan.trials()
    first = {launch.point.family: launch.rate for launch in reversed(tried)}
    return tuple(dict.fromkeys([*tried, *plan.runs({**first, **sweep.rates})]))


def seconds_left(sweep: Sweep) -> float | None:
    """Of all runs that are not done, at the pace of this sweep; None before anything is known."""
    known = list(sweep.progress.values())
    took = [p.seconds for p in known if p.state is State.DONE and p.seconds is not None]
    running = next((p for p in known if p.state is State.RUNNING), None)
    if not took and running is not None and running.step and running.seconds:
        took = [running.seconds * running.steps / running.step]
    if not took:
        return None
    states = [_state(sweep, launch) for launch in all_of(sweep)]
    left = sum(state in (State.OPEN, State.RUNNING, State.ELSEWHERE) for state in states)
    spent = running.seconds if running is not None and running.seconds else 0.0
    return max(left * sum(took) / len(took) - spent, 0.0)


def _state(sweep: Sweep, launch: Launch) -> State:
    return sweep.progress.get(launch.name, Progress()).state


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
