"""Handles preemption (SIGTERM before a machine is taken away) and Ctrl-C, which is treated alike:
the run stops between two steps and saves.

Outside the loop (reading text, writing the report) there is nothing to save, and the program ends
at once. Both end with status 0, and the same command resumes the run. A second Ctrl-C does not wait
for the step: status 130.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engram_jax.hardware.interrupts import (
    INTERRUPTED,
    end_within,
    ends_by_itself,
    interrupted_line,
)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(SystemExit):
    """SIGTERM or SIGINT arrived where nothing had to be saved."""


class Preemption:
    """Context manager that handles both signals; only in the main thread, where Python allows it.

    signal: the name of the one that came, "SIGTERM" until then.

    JAX's own mechanism (`multihost_utils.reached_preemption_sync_point`) works only for launches
    that call it before the signal: its sync point is one past the highest step so far, which for a
    run resumed at step 1000 and signalled while it compiles is step 1, which is never reached.
    """

    def __init__(self, log: Callable[[str], None] = print):
        self.stopped = False  # the processes have agreed to stop
        self._log = log
        self._requested = self._deferred = False
        self.signal = signal.SIGTERM.name
        self._previous: dict[signal.Signals, Any] = {}
        self._asked: jax.Array | None = None  # the last answer, possibly still being computed
        self._any: Callable[[jax.Array], jax.Array] | None = None

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        for number, previous in self._previous.items():
            # None: the handler was not installed from Python, which cannot restore it.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        if isinstance(error, Preempted):
            self._log(self._nothing_to_save())
            ends_by_itself()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal only requests the end; `agreed` returns True when to stop.

        Raises Preempted on leaving if the signal came too late for that.
        """
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self._requested and not self.stopped:
            raise Preempted(0)

    def agreed(self, *, wait: bool = False) -> bool:
        """Whether all processes stop at this step. All must call it, at the same steps.

        On one process it is whether the signal has arrived. On several, each call starts an
        all-reduce of the flags and returns the result of the previous call's (wait: of this one's),
        which is long complete: the device never waits for the host. So the run may end one step
        later.
        """
        if jax.process_count() == 1:
            self.stopped = self._requested
        elif not self.stopped:
            before, self._asked = self._asked, self._ask()
            answer = self._asked if wait or before is None else before
            self.stopped = bool(jax.device_get(answer))
        return self.stopped

    def _ask(self) -> jax.Array:
        """Start the "or" of the flags of all processes; a bool [] that every process can read."""
        mesh = Mesh(np.array(jax.devices()), ("all",))
        if self._any is None:
            replicated = NamedSharding(mesh, PartitionSpec())
            self._any = jax.jit(jnp.any, out_shardings=replicated)
        flag = np.full((1,), self._requested)
        flags = jax.make_array_from_single_device_arrays(
            (mesh.size,),
            NamedSharding(mesh, PartitionSpec("all")),
            [jax.device_put(flag, device) for device in mesh.local_devices],
        )
        return self._any(flags)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self._requested and number == signal.SIGINT
        self._requested, self.signal = True, signal.Signals(number).name
        if not self._deferred:
            end_within(0, self._nothing_to_save())
            raise Preempted(0)
        if again:
            end_within(INTERRUPTED, f"error: {interrupted_line()}")
            raise KeyboardInterrupt

    def _nothing_to_save(self) -> str:
        return f"{self.signal}: ended where there was nothing to save; the same command goes on"
