"""--profile=START:STOP: what the devices do in a few steps, for TensorBoard or Perfetto."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import jax

from engram_jax.config.errors import UserError

FOLDER = "profile"


def parse_window(text: str, steps: int) -> tuple[int, int]:
    """START:STOP -> the steps to record: those after START updates, until STOP are applied.

    steps: of the run. Raises UserError for what is no such window.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found:
        raise UserError(f"--profile={text}: must be START:STOP, two step numbers such as 100:105")
    start, stop = int(found[1]), int(found[2])
    if not start < stop:
        raise UserError(f"--profile={text}: must have START below STOP")
    if stop > steps:
        raise UserError(f"--profile={text}: STOP must be at most config.train.steps = {steps}")
    return start, stop


class ProfileWindow:
    """Context that records `window`, if any, into `workdir`/profile; each process its own file.

    first_step: where the launch starts; the part of the window before it is not recorded.
    """

    def __init__(
        self,
        window: tuple[int, int] | None,
        workdir: Path,
        *,
        first_step: int,
        log: Callable[[str], None],
    ):
        self._folder, self._log = workdir / FOLDER, log
        self._running = False
        self._start, self._stop = -1, -1
        if window is None:
            return
        if first_step >= window[1]:
            log(f"--profile: steps {window[0]} to {window[1]} are done; nothing is recorded")
            return
        self._start, self._stop = max(window[0], first_step), window[1]

    def at_edge(self, step: int) -> bool:
        """Whether recording starts or ends after `step` updates; those must have ended by then."""
        return step in (self._start, self._stop)

    def begin(self, step: int) -> None:
        """Start if the next step to be dispatched is the first to record."""
        if step == self._start:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def end(self, step: int) -> None:
        """Stop if `step` was the last to record."""
        if step == self._stop:
            self._close()

    def __enter__(self) -> ProfileWindow:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            self._log(f"profile: {self._folder}")
