"""goodput.json: the share of a run's time that was spent on training steps that count.

    goodput = seconds of training steps that count / seconds of all launches

* Seconds of a launch run from its call of `train` to the last sign of life of its loop: reading
  data, restoring, compiling, training, evaluating, saving, hanging. The time between two launches
  does not count.
* A step counts if later checkpoints build on it. What a killed launch did after its last
  checkpoint is done again by the next one; it stays in the denominator and leaves the numerator.

    {"launches": [{"resumed_at": 0, "seconds": 81.2, "training_seconds": 60.1,
                   "saved": {"500": 30.0, "1000": 59.9}}, ...]}

saved: the launch's training seconds at each of its checkpoints. The file is replaced by renaming,
by a thread every few seconds too, so that a kill loses no more than those. One process writes.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from engram_jax.config.errors import UserError, shown
from engram_jax.config.given_files import read_json
from engram_jax.hardware.storage import write_text

FILE = "goodput.json"
_EVERY = 5.0


class Goodput:
    """The account of one launch, after those before it.

    resumed_at: the step this launch starts from. training_seconds: those of this launch so far.
    started: when the launch began, by `clock`.
    Raises UserError if the file there is not one of ours.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        resumed_at: int,
        training_seconds: Callable[[], float],
        started: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        every: float = _EVERY,
    ):
        self._path, self._training, self._clock = workdir / FILE, training_seconds, clock
        self._started = clock() if started is None else started
        self._writes = jax.process_index() == 0
        self._before = [_kept(launch, resumed_at) for launch in read(workdir)]
        self._saved: dict[str, float] = {}
        self._resumed_at, self._every = resumed_at, every
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="goodput", daemon=True)

    def value(self) -> float:
        """The share so far, in [0, 1]."""
        launches = [*self._before, self._own()]
        seconds = sum(launch["seconds"] for launch in launches)
        return sum(launch["training_seconds"] for launch in launches) / max(seconds, 1e-9)

    def saved(self, step: int) -> None:
        """The state after `step` is, or is about to be, a checkpoint."""
        with self._lock:
            self._saved[str(step)] = self._training()
        self.write()

    def write(self) -> None:
        """Bring the file up to date."""
        if not self._writes:
            return
        with self._lock:
            launches = [*self._before, self._own()]
            write_text(self._path, json.dumps({"launches": launches}) + "\n")

    def __enter__(self) -> Goodput:
        self.write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self.write()

    def _own(self) -> dict[str, Any]:
        return {
            "resumed_at": self._resumed_at,
            "seconds": self._clock() - self._started,
            "training_seconds": self._training(),
            "saved": dict(self._saved),
        }

    def _beat(self) -> None:
        while not self._end.wait(self._every):
            try:
                self.write()
            except OSError:  # a full disk stops the run where it matters, not here
                continue


def read(workdir: Path) -> list[dict[str, Any]]:
    """The launches of `workdir`/goodput.json, oldest first; [] if there is none."""
    path = workdir / FILE
    if not path.exists():
        return []
    try:
        launches = list(read_json(path)["launches"])
        for launch in launches:
            float(launch["seconds"]), float(launch["training_seconds"])
            for step, seconds in dict(launch["saved"]).items():
                int(step), float(seconds)
    except UserError as error:
        raise UserError(f"{error}; not an account of launches: move it away") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{shown(path)}: is not an account of launches; move it away") from error
    return launches


def _kept(launch: dict[str, Any], step: int) -> dict[str, Any]:
    """The launch with the steps that a run resumed at `step` builds on."""
    saved = {name: seconds for name, seconds in launch["saved"].items() if int(name) <= step}
    return {**launch, "saved": saved, "training_seconds": max(saved.values(), default=0.0)}
