"""Runs the engine on a thread of its own; other threads send it commands through a queue.

The engine is single-threaded and a step takes milliseconds to seconds, so a server's event loop
must neither call it nor wait for it. Commands are carried out in order, between steps.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

from engram_jax.config.errors import UserError
from engram_jax.serve.request import Delta, Finish, QueueFullError, SamplingParams

Sequences = Sequence[tuple[Sequence[int], SamplingParams]]
Listener = Callable[[int, Delta], None]
"""Told of every delta, with the sequence's place in its group. Called on the engine's thread: it
must return at once (`asyncio` gets it by `loop.call_soon_threadsafe`)."""

LOG = logging.getLogger(__name__)
FAILED = "the engine has failed; the server's log says why"
CLOSED = "the server is shutting down"
STATS_EVERY = 0.1  # seconds
CANCEL_SECONDS = 10.0  # in which a step ends and what was cancelled is gone


class ClosedError(Exception):
    """The runner takes no requests any more: it drains, is closed, or its engine has failed."""


class Steps(Protocol):
    """What the runner needs of the engine (serve/engine.py)."""

    @property
    def busy(self) -> bool: ...
    def submit(
        self, prompt: Sequence[int], params: SamplingParams, request: Hashable = None
    ) -> int: ...
    def cancel(self, request: int) -> None: ...
    def step(self) -> list[Delta]: ...
    def stats(self) -> Mapping[str, float]: ...


class Group:
    """Sequences that were submitted together.

    accepted: resolves when the engine has taken all of them, or none: then to its UserError,
      QueueFullError or ClosedError.
    """

    def __init__(self, runner: EngineThread, listener: Listener):
        self.accepted: Future[None] = Future()
        self.ids: tuple[int, ...] = ()
        self.listener = listener
        self._runner = runner

    def cancel(self) -> None:
        """End those that still run; the listener hears nothing more. Any thread, at any time."""
        self.listener = _ignore
        self._runner.end([self])


class EngineThread:
    """Steps the engine while it is busy and sleeps otherwise. Public methods are thread-safe."""

    def __init__(self, engine: Steps):
        self._engine = engine
        self._changed = threading.Condition()
        self._submitted: list[tuple[Group, Sequences]] = []
        self._ended: list[Group] = []
        self._open: dict[int, tuple[Group, int]] = {}  # request -> its group and place
        self._failed = self._draining = self._closed = False
        self._stats: Mapping[str, float] = dict(engine.stats())
        self._stats_at = 0.0
        self.cut = 0  # requests that `drain` cancelled
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def state(self) -> str:
        """ "ok", "draining" (or closed) or "failed"."""
        if self._failed:
            return "failed"
        return "draining" if self._draining else "ok"

    def stats(self) -> Mapping[str, float]:
        """The engine's, at most `STATS_EVERY` s and one step old: asking does not wait for it."""
        return self._stats

    @property
    def left(self) -> int:
        """Requests that have not ended."""
        # The engine's thread changes it without the lock; `list` is one step to Python.
        groups = [*list(self._open.values()), *self._submitted]
        return len({id(group) for group, _ in groups})

    def submit(self, sequences: Sequences, listener: Listener) -> Group:
        """Queue all of `sequences` (prompt, parameters) or none; does not wait for the answer."""
        group = Group(self, listener)
        with self._changed:
            if self._failed or self._draining:
                group.accepted.set_exception(ClosedError(self.state))
            else:
                self._submitted.append((group, sequences))
                self._changed.notify_all()
        return group

    def end(self, groups: Sequence[Group]) -> None:
        """Cancel what still runs of them; the listeners hear of it."""
        with self._changed:
            self._ended += groups
            self._changed.notify_all()

    def drain(self, timeout: float) -> bool:
        """Refuse new requests, let the others finish for `timeout` s, then cancel what is left
        (`cut` says how many).

        Returns whether all finished in time.
        """
        with self._changed:
            self._draining = True
            done = self._changed.wait_for(lambda: not (self._open or self._submitted), timeout)
            if not done:
                self.cut = self.left
                self._ended += [group for group, _ in list(self._open.values())]
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._open, CANCEL_SECONDS)
        return done

    def close(self, timeout: float = CANCEL_SECONDS) -> None:
        """End the thread after its present step (waits `timeout` s); open requests get an error."""
        with self._changed:
            self._draining = self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout)

    # On the engine's thread.

    def _run(self) -> None:
        error = CLOSED
        try:
            while self._take_commands():
                if self._engine.busy or self._open:
                    for delta in self._engine.step():
                        self._deliver(delta)
                    if self._open and not self._engine.busy:
                        raise RuntimeError(f"the engine is idle; not ended: {sorted(self._open)}")
                self._note_stats()
        except BaseException:
            LOG.exception("the engine failed; requests are refused from now on")
            self._failed, error = True, FAILED
        finally:
            self._end_all(error)

    def _take_commands(self) -> bool:
        """Carry out what was asked; sleep while there is nothing to do. False: closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._closed
                    or self._submitted
                    or self._ended
                    or self._open
                    or self._engine.busy
                )
            )
            if self._closed:
                return False
            submitted, ended, self._ended = list(self._submitted), self._ended, []
        for group, sequences in submitted:
            self._submit(group, sequences)
        for group in ended:  # after every submission, and so after its own
            self._cancel(group.ids)
        with self._changed:  # only now: `drain` must see a submission here or among the open ones
            del self._submitted[: len(submitted)]
            self._changed.notify_all()
        return True

    def _submit(self, group: Group, sequences: Sequences) -> None:
        if not group.accepted.set_running_or_notify_cancel():
            return  # its caller has left
        ids: list[int] = []
        try:
            for prompt, params in sequences:
                ids.append(self._engine.submit(prompt, params, group))
        except Exception as error:
            group.accepted.set_exception(error)
            if not isinstance(error, UserError | QueueFullError):
                LOG.exception("a request could not be submitted")
            self._cancel(ids)
            return
        group.ids = tuple(ids)
        self._open |= {request: (group, place) for place, request in enumerate(ids)}
        group.accepted.set_result(None)

    def _cancel(self, ids: Sequence[int]) -> None:
        for request in ids:
            self._engine.cancel(request)

    def _deliver(self, delta: Delta) -> None:
        if delta.request not in self._open:
            return  # of a group that was refused
        group, place = self._open[delta.request]
        if delta.finish is not None:
            del self._open[delta.request]
        try:
            group.listener(place, delta)
        except Exception:  # for example, its event loop is closed
            LOG.exception("nobody takes the answer of a request; it is cancelled")
            group.cancel()

    def _note_stats(self) -> None:
        now = time.monotonic()
        if now - self._stats_at >= STATS_EVERY or not self._engine.busy:
            self._stats, self._stats_at = dict(self._engine.stats()), now
        with self._changed:
            self._changed.notify_all()  # `drain` looks at the open ones

    def _end_all(self, error: str) -> None:
        """Nobody may wait for a thread that has ended."""
        with self._changed:
            self._closed = self._draining = True
            submitted, self._submitted = self._submitted, []
        for group, _ in submitted:
            if not group.accepted.done() and group.accepted.set_running_or_notify_cancel():
                group.accepted.set_exception(ClosedError(self.state))
        for request in list(self._open):
            self._deliver(Delta(request, finish=Finish.ERROR, error=error))
        with self._changed:
            self._changed.notify_all()


def _ignore(place: int, delta: Delta) -> None:
    pass
