"""What all request bodies that are still arriving may hold together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from engram_jax.serve.http.json_fields import ApiError

RATE = 4 << 20  # bytes a second of large bodies: what all of them may cost the others
LARGE = 1 << 16  # bytes of a body that always arrive at once
FULL = "too many bodies are arriving; this one was the largest that was not complete"


class Arriving:
    """Bodies that are not complete. When together they hold more than `room` bytes, the largest is
    given up (of equal ones, the oldest): many large and slow ones keep no small one out."""

    def __init__(self, room: int):
        self.room, self.held = room, 0  # bytes
        self._free = 0.0  # when, on the loop's clock, the next part of a large body may be read
        self._bodies: dict[Body, None] = {}

    @contextlib.contextmanager
    def one(self, timeout: asyncio.Timeout) -> Iterator[Body]:
        """A body that arrives within the block. timeout: around the block, to end it."""
        body = Body(self, timeout)
        self._bodies[body] = None
        try:
            yield body
        finally:
            del self._bodies[body]
            self.held -= body.size

    def grow(self, body: Body, size: int) -> None:
        body.size += size
        self.held += size
        while self.held > self.room:
            largest = max(self._bodies, key=lambda one: one.size)
            self.held -= largest.size
            largest.give_up()

    def wait(self, size: int) -> float:
        """Seconds to wait before more of a large body is read, now that it has `size` more."""
        now = asyncio.get_running_loop().time()
        self._free = max(self._free, now) + size / RATE
        return self._free - now


class Body:
    """size: bytes held. given_up: its room was needed."""

    def __init__(self, others: Arriving, timeout: asyncio.Timeout):
        self.size, self.given_up = 0, False
        self._others, self._timeout = others, timeout
        self._arrived = 0

    async def paced(self, size: int) -> None:
        """Wait, with `size` more bytes of it there, while large bodies arrive faster than `RATE`.
        The client's time goes on when it ends."""
        self._arrived += size
        if self._arrived > LARGE and (seconds := self._others.wait(size)) > 0:
            until = self._timeout.when()
            assert until is not None
            self._timeout.reschedule(until + seconds)
            await asyncio.sleep(seconds)

    def grow(self, size: int) -> None:
        """Raises ApiError if this is the one to be given up."""
        self._others.grow(self, size)
        if self.given_up:
            raise full()

    def give_up(self) -> None:
        self.size, self.given_up = 0, True
        self._timeout.reschedule(asyncio.get_running_loop().time())


def full() -> ApiError:
    close = {"Connection": "close", "Retry-After": "1"}
    return ApiError(503, FULL, code="bodies_full", headers=close)
