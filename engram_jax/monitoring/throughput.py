"""How fast a launch trains: step times, tokens per second, model FLOPs utilisation.

A step's time is the time from the end of the step before to its own end, as the host sees them.
What lies between two steps on purpose (evaluation, checkpoint) is cut out, so a long time is a
straggler, a late batch or a slow disk. The first step of a launch compiles and is in no figure.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

WINDOW = 200  # steps of the percentiles
RECENT = 50  # steps of the medians: the speed now


class Throughput:
    """The clock of one launch's steps.

    tokens_per_step: of all processes. devices: of all processes.
    flops_per_step: what the model's own count says of one step, on all devices.
    peak_flops: FLOP/s of one device, None if unknown (then there is no utilisation).
    """

    def __init__(
        self,
        *,
        tokens_per_step: int,
        devices: int = 1,
        flops_per_step: float = 0.0,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._tokens, self._devices = tokens_per_step, devices
        self._flops, self._peak = flops_per_step, peak_flops
        self._clock = clock
        self._last: float | None = None  # the end of the step before; None before the first
        self._times: deque[float] = deque(maxlen=WINDOW)
        self._sum = 0.0

    def finished(self) -> None:
        """A step has ended."""
        now = self._clock()
        if self._last is not None:
            self._times.append(now - self._last)
            self._sum += now - self._last
        self._last = now

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is no training, between two steps."""
        start = self._clock()
        yield
        if self._last is not None:
            self._last += self._clock() - start

    @property
    def training_seconds(self) -> float:
        """Seconds spent in this launch's steps; the first, which compiled, counts as the median."""
        return self._sum + statistics.median(self._times) if self._times else 0.0

    def rates(self) -> dict[str, float]:
        """{} before the second step. Medians over the last 50 steps: step_seconds,
        tokens_per_second, tokens_per_second_per_device, and mfu (share of the devices' bfloat16
        peak; only where that is known). Over the last 200: step_seconds/p50, p90, p99 and max.
        """
        if not self._times:
            return {}
        seconds = max(statistics.median(list(self._times)[-RECENT:]), 1e-9)
        out = {
            "step_seconds": seconds,
            "tokens_per_second": self._tokens / seconds,
            "tokens_per_second_per_device": self._tokens / seconds / self._devices,
        }
        if self._peak is not None:
            out["mfu"] = self._flops / seconds / (self._devices * self._peak)
        percentiles = np.percentile(self._times, (50, 90, 99, 100))
        names = ("p50", "p90", "p99", "max")
        out |= {f"step_seconds/{n}": float(p) for n, p in zip(names, percentiles, strict=True)}
        return out
