"""Encodes large answers as JSON in pieces, off the event loop and without taking the machine.

`json.dumps` holds Python's lock from its first to its last byte, on whatever thread it runs: an
answer of 100 MB would stop the event loop and the engine for a second. Here a value is encoded in
parts of some dozens of numbers, and a thread that has worked for a while rests for some times as
long (`REST`), so that all large answers together take a small share of a core from the engine.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.types import Send

from engram_jax.serve.http.responses import dumps

TOGETHER = 64  # elements of a list that are encoded at once
PIECE = 1 << 16  # bytes that are sent at once; a transport holds as much before it says stop
SMALL = 4096  # tokens and log-probabilities of an answer that is encoded at once
REST = 4.0  # times as long as it has worked a thread rests


def pieces(value: Any) -> Iterator[bytes]:
    """The JSON of a value in parts. A function stands for what it returns and an iterator for a
    list; both are asked when their turn comes."""
    if callable(value):
        yield from pieces(value())
    elif isinstance(value, dict):
        for i, (key, item) in enumerate(value.items()):
            yield (b"," if i else b"{") + dumps(key) + b":"
            yield from pieces(item)
        yield b"}" if value else b"{}"
    elif isinstance(value, list) and not any(map(_nested, value[:1])):
        for i in range(0, len(value), TOGETHER):
            yield (b"," if i else b"[") + dumps(value[i : i + TOGETHER])[1:-1]
        yield b"]" if value else b"[]"
    elif isinstance(value, list | Iterator):
        yield b"["
        for i, item in enumerate(value):
            if i:
                yield b","
            yield from pieces(item)
        yield b"]"
    else:
        yield dumps(value)


def _nested(value: Any) -> bool:
    """Whether an element of a list may itself be large."""
    inner = value.values() if isinstance(value, dict) else ()
    return any(isinstance(item, dict | list) for item in inner)


def gathered(parts: Iterator[bytes], size: int = PIECE) -> Iterator[bytes]:
    """The same bytes in pieces of at least `size`, but the last."""
    piece = bytearray()
    for part in parts:
        piece += part
        if len(piece) >= size:
            yield bytes(piece)
            piece.clear()
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
        whole = itertools.chain([before], pieces(make), [after])
        parts = gathered(whole)
        loop = asyncio.get_running_loop()
        while (piece := await loop.run_in_executor(self._thread, _next, parts)) is not None:
            await send({"type": "http.response.body", "body": piece, "more_body": True})


def _next(parts: Iterator[bytes]) -> bytes | None:
    """The next piece; then a rest."""
    began = time.perf_counter()
    piece = next(parts, None)
    if piece is not None:
        time.sleep(REST * (time.perf_counter() - began))
    return piece
