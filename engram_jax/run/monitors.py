"""Combines the monitors of a launch (throughput, goodput, profiler, watchdog) for the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax

from engram_jax.config import Config
from engram_jax.hardware.peak_flops import peak_flops
from engram_jax.model import describe
from engram_jax.monitoring.goodput import Goodput
from engram_jax.monitoring.hang_watchdog import Watchdog
from engram_jax.monitoring.profiling import ProfileWindow
from engram_jax.monitoring.throughput import Throughput


class Monitors:
    """Context manager around the loop: step times, goodput, profiler window, watchdog.

    started: time.monotonic() at the start of the launch, None: now.
    profile: (START, STOP), see monitoring/profiling.py.
    """

    def __init__(
        self,
        config: Config,
        workdir: Path,
        *,
        first_step: int,
        started: float | None = None,
        profile: tuple[int, int] | None = None,
        log: Callable[[str], None] = print,
    ):
        tokens = config.data.batch_size * config.data.seq_len
        peak = peak_flops(jax.devices()[0].device_kind)
        self.throughput = Throughput(
            tokens_per_step=tokens,
            devices=jax.device_count(),
            flops_per_step=tokens * describe.training_flops(config) if peak else 0.0,
            peak_flops=peak,
        )
        self.goodput = Goodput(
            workdir,
            resumed_at=first_step,
            training_seconds=lambda: self.throughput.training_seconds,
            started=started,
        )
        self.profile = ProfileWindow(profile, workdir, first_step=first_step, log=log)
        self.watchdog = Watchdog(
            config.train.hang_seconds, step=first_step, exits=config.train.hang_exit
        )
        self._stack = ExitStack()

    def __enter__(self) -> Monitors:
        for each in (self.goodput, self.watchdog, self.profile):
            self._stack.enter_context(each)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def finished(self, step: int) -> None:
        """The host has seen that the step has ended after which `step` updates are applied."""
        self.throughput.finished()
        self.watchdog.finished(step)

    def at_edge(self, step: int) -> bool:
        """Whether all steps up to `step` must have ended before `begin` and `end` are called."""
        return self.profile.at_edge(step)

    def begin(self, step: int) -> None:
        """The step after `step` updates is about to be dispatched."""
        if self.at_edge(step):
            with self.throughput.pause():
                self.profile.begin(step)

    def end(self, step: int) -> None:
        """`step` updates are applied, no step is running, evaluation and checkpoint follow."""
        if self.at_edge(step):
            with self.throughput.pause():
                self.profile.end(step)

    @contextmanager
    def pause(self, step: int, *, saves: bool = True) -> Iterator[None]:
        """Around evaluating and, where it `saves`, saving the state after `step`."""
        self.watchdog.doing("evaluating or saving")
        with self.throughput.pause():
            yield
            if saves:
                self.goodput.saved(step)
        self.watchdog.doing("training", patience=1.0)

    def rates(self) -> dict[str, float]:
        """`Throughput.rates` and goodput; {} before the second step of a launch."""
        rates = self.throughput.rates()
        return {**rates, "goodput": self.goodput.value()} if rates else {}
