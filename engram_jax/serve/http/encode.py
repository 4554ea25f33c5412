"""Encodes large answers as JSON in pieces, off the event loop and without taking the machine.

`json.dumps` holds Python's lock from its first to its last byte, on whatever thread it runs: an
answer of 100 MB would stop the event loop and the engine for a second. A thread that wants the lock
asks for it back after 5 ms, and a step of the engine wants it often. So a value is encoded in parts
of some dozens of numbers, and the thread that does it rests after every `WORK` seconds for some
times as long (`REST`): all large answers together take a small share of a core from the engine, and
hold the lock no longer than that at a time.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.types import Send

from engram_jax.serve.http.responses import dumps

TOGETHER = 64  # numbers and texts that are encoded at once
PIECE = 1 << 16  # bytes that are sent at once; a transport holds as much before it says stop
SMALL = 4096  # tokens and log-probabilities of an answer that is encoded at once
WORK = 0.0005  # seconds that a thread encodes without a rest
REST = 4.0  # times as long as it has worked it rests


def pieces(value: Any) -> Iterator[bytes]:
    """The JSON of a value in parts. A function stands for what it returns and an iterator for a
    list; both are asked when their turn comes."""
    if callable(value):
        yield from pieces(value())
    elif isinstance(value, list | Iterator):
        yield from _elements(value)
    elif _at_once(value):
        yield dumps(value)
    else:
        for i, (key, item) in enumerate(value.items()):
            yield (b"," if i else b"{") + dumps(key) + b":"
            yield from pieces(item)
        yield b"}"


def _elements(values: Iterable[Any]) -> Iterator[bytes]:
    """Of a list; small ones together."""
    before = b"["
    some: list[Any] = []
    count = 0
    for value in values:
        if size := _at_once(value):
            some.append(value)
            count += size
        if some and (count >= TOGETHER or not size):
            yield before + dumps(some)[1:-1]
            before, some, count = b",", [], 0
        if not size:
            yield before
            yield from pieces(value)
            before = b","
    yield (before + dumps(some)[1:-1] if some else b"" if before == b"," else before) + b"]"


def _at_once(value: Any) -> int:
    """How many numbers and texts a value has if these are few; 0: it is encoded in parts."""
    if isinstance(value, dict):
        few = len(value) <= TOGETHER and _SCALARS.issuperset(map(type, value.values()))
        return max(1, len(value)) if few else 0
    return int(type(value) in _SCALARS)


_SCALARS = {str, int, float, bool, type(None)}


def gathered(parts: Iterable[bytes], size: int = PIECE, rest: float = 0.0) -> Iterator[bytes]:
    """The same bytes in pieces of at least `size`, but the last. rest: after every `WORK` seconds
    of work, in multiples of its time."""
    piece = bytearray()
    began = time.perf_counter()
    for part in parts:
        piece += part
        worked = time.perf_counter() - began
        if rest and worked >= WORK:
            time.sleep(rest * worked)
            began = time.perf_counter()
        if len(piece) >= size:
            yield bytes(piece)
            piece.clear()
            began = time.perf_counter()
    yield bytes(piece)


class Encoder:
    """Sends large values. Its thread works for all of them, a piece of each in turn."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")

    async def send(
        self, make: Callable[[], Any], send: Send, *, before: bytes = b"", after: bytes = b""
    ) -> None:
        """Send the JSON of what `make` returns, between two texts, as parts of a body that goes on.

        make: called on the thread.
        """
        parts = gathered(itertools.chain([before], pieces(make), [after]), rest=REST)
        loop = asyncio.get_running_loop()
        while (piece := await loop.run_in_executor(self._thread, next, parts, None)) is not None:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
