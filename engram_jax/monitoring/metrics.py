"""Writes a run's metrics: metrics.jsonl, its loggers (loggers.py), and a progress bar.

metrics.jsonl holds one JSON object per line: "step" (updates applied), "time" (seconds since the
epoch), then metrics: numbers, or nested lists for arrays. NaN and infinities are the strings "NaN",
"Infinity" and "-Infinity", because JSON has no others; `read_metrics` turns them back.

While training: loss, grad_norm, validation_loss with its validation_targets, and what
training/step.py and monitoring/throughput.py name; what belongs to a layer ends in its id. At the
end: held_out_loss with its held_out_targets. evaluation/held_out.py says what these losses are of.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from tqdm import tqdm

from engram_jax.config import TENSORBOARD
from engram_jax.config.given_files import open_file
from engram_jax.hardware.storage import write_text
from engram_jax.monitoring.loggers import Logger, Measured, open_loggers

_FILE = "metrics.jsonl"
_FEW = 16  # arrays of at most so many values are curves of a logger, larger ones histograms


class MetricsWriter:
    """Writes metrics of one launch to `workdir`; a no-op on all processes but the first.

    start_step: the step the launch starts from. What an interrupted launch wrote of later steps is
      removed, so that every metric stays a function of the step.
    loggers: of config.train.loggers; config: what they show with the run. Raises UserError for one
      that is not installed or cannot be reached.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        start_step: int = 0,
        loggers: tuple[str, ...] = (TENSORBOARD,),
        config: Mapping[str, Any] | None = None,
    ):
        self._file: TextIO | None = None
        self._loggers: list[Logger] = []
        if jax.process_index() != 0:
            return
        path = Path(workdir) / _FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        _forget_after(path, start_step)
        self._loggers = open_loggers(loggers, path.parent, start_step, config or {})
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log numbers and arrays (host or device) of a step; the line is on disk on return."""
        if self._file is None:
            return
        now = time.time()
        values = {name: np.asarray(value) for name, value in metrics.items()}
        record = {name: json_value(value.tolist()) for name, value in values.items()}
        line = json.dumps({"step": int(step), "time": now, **record}, allow_nan=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            error.filename = error.filename or self._file.name
            raise
        found = Measured(int(step), *shown(values), now)
        for logger in self._loggers:
            logger.log(found)

    def close(self) -> None:
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
        except OSError as error:
            error.filename = error.filename or _FILE
            raise
        finally:
            while self._loggers:
                self._loggers.pop(0).close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def shown(values: Mapping[str, np.ndarray]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """(curves, histograms) of numbers and arrays: an array of a few values is a curve for each,
    NAME/INDEX; of a larger one the histogram, unless a value is not finite."""
    scalars: dict[str, float] = {}
    histograms: dict[str, np.ndarray] = {}
    for name, given in values.items():
        value = given.astype(np.float64)
        if value.ndim == 0:
            scalars[name] = float(value)
        elif value.size <= _FEW:
            for index, item in np.ndenumerate(value):
                scalars["/".join([name, *map(str, index)])] = float(item)
        elif np.isfinite(value).all():
            histograms[name] = value.ravel()
    return scalars, histograms


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The records of `workdir`/metrics.jsonl in order, lists as arrays; [] if there is no file.

    A last line that a killed process left unfinished is passed over.
    """
    path = Path(workdir) / _FILE
    lines = _lines(path)
    return [
        {
            key: np.asarray(_number(value)) if isinstance(value, list) else _number(value)
            for key, value in record.items()
        }
        for record in map(_parse, lines)
        if record is not None
    ]


def _lines(path: Path) -> list[str]:
    """The file's lines with their ends. Bytes that are not UTF-8 make their own line unreadable,
    which is passed over, and no other. Raises UserError for what is no file."""
    if not path.exists():
        return []
    with open_file(path) as file:
        return [line.decode(errors="replace") for line in file.readall().splitlines(keepends=True)]


def _forget_after(path: Path, step: int) -> None:
    """Remove the records of later steps, and an unfinished last line; atomically."""
    if not path.exists():
        return
    lines = _lines(path)
    kept = [line for line in lines if (r := _parse(line)) is not None and r["step"] <= step]
    if kept != lines:
        write_text(path, "".join(kept))


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        _number(list(record.values()) if isinstance(record, dict) else [])
    except (ValueError, RecursionError):
        return None
    readable = isinstance(record, dict) and type(record.get("step")) is int
    return record if readable and "\ufffd" not in line else None


def json_value(value: Any) -> Any:
    """`value` (nested lists and dicts of plain values) with what is not finite as a string."""
    if isinstance(value, dict):
        return {key: json_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(item) for item in value]
    return float(value) if isinstance(value, str) else value


class Progress:
    """A bar with loss, speed and time left; lines of text where there is no terminal.

    total: steps of the run. start: the step this launch starts from.
    rates: called for what is to be shown, as far as it is there: tokens_per_second, step_seconds,
      mfu, goodput. interval: seconds between two lines.
    stream: default standard error.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        rates: Callable[[], Mapping[str, float]] = dict,
        interval: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._step, self._rates = total, start, rates
        self._stream = sys.stderr if stream is None else stream
        self._silent = jax.process_index() != 0
        self._clock, self._interval = clock, interval
        self._first: tuple[int, float] | None = None
        self._last, self._said = clock(), -math.inf
        self._bar: tqdm | None = None
        if not self._silent and self._stream.isatty():
            self._bar = tqdm(
                total=total,
                initial=start,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            )

    def update(self, step: int, *, loss: float) -> None:
        """`step` updates have been applied; the last one had this loss."""
        now = self._clock()
        if self._first is None:
            self._first = (step, now)  # the first step compiles: it is in no rate
        advanced, self._step, self._last = step - self._step, step, now
        if self._bar is not None:
            self._bar.set_postfix_str(self._summary(loss), refresh=False)
            self._bar.update(advanced)
        elif not self._silent and (now - self._said >= self._interval or step == self._total):
            self._said = now
            print(
                f"step {step}/{self._total}  {self._summary(loss)}", file=self._stream, flush=True
            )

    def seconds_left(self) -> float | None:
        """Remaining steps at the average pace of this launch, its pauses included."""
        if self._first is None or self._step <= self._first[0]:
            return None
        pace = (self._last - self._first[1]) / (self._step - self._first[0])
        return pace * (self._total - self._step)

    def note(self, text: str) -> None:
        """A line of text above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif not self._silent:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _summary(self, loss: float) -> str:
        parts, rates, left = [f"loss {loss:.4f}"], self._rates(), self.seconds_left()
        if "tokens_per_second" in rates:
            parts.append(f"{_short(rates['tokens_per_second'])} tokens/s")
        if "step_seconds" in rates:
            parts.append(f"{rates['step_seconds']:.3g} s/step")
        parts += [f"{rates[k]:.1%} {k}" for k in ("mfu", "goodput") if k in rates]
        if left is not None:
            parts.append(f"{_duration(left)} left")
        return "  ".join(parts)


def _short(number: float) -> str:
    for power, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= power:
            return f"{number / power:.3g}{suffix}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
