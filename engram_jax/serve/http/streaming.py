"""Puts the engine's deltas together and sends them as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from starlette.types import Send

from engram_jax.serve.http.completion_response import Answer
from engram_jax.serve.http.encode import Encoder
from engram_jax.serve.http.json_fields import ApiError
from engram_jax.serve.http.responses import dumps
from engram_jax.serve.request import Delta, Finish

LISTED = 64  # log-probabilities of a prompt that the event loop lists itself
EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


async def until_all_end(
    deltas: asyncio.Queue[tuple[int, Delta]], sequences: int
) -> AsyncIterator[list[tuple[int, Delta]]]:
    """The deltas of all sequences, those together that arrived together.

    Raises ApiError if a sequence ends without its answer.
    """
    while sequences:
        arrived = [await deltas.get()]
        while not deltas.empty():
            arrived.append(deltas.get_nowait())
        for _, delta in arrived:
            if delta.finish == Finish.ERROR:
                raise ApiError(500, delta.error)
            if delta.finish == Finish.CANCELLED:
                raise ApiError(503, "cancelled: the server is shutting down", code="draining")
            sequences -= delta.finish is not None
        yield arrived


async def stream(
    answer: Answer,
    arriving: AsyncIterator[list[tuple[int, Delta]]],
    send: Send,
    encoder: Encoder,
) -> int | None:
    """Server-sent events. What goes wrong after the first one is an event, too; its status is
    returned."""
    failed = None
    await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})

    async def events(values: list[Any]) -> None:
        if not values:
            return
        body = b"".join(b"data: " + dumps(value) + b"\n\n" for value in values)
        await send({"type": "http.response.body", "body": body, "more_body": True})

    try:
        async for arrived in arriving:
            ready: list[Any] = []
            for place, delta in arrived:
                add = answer.choices[place].add
                if len(delta.prompt_logprobs) <= LISTED:
                    ready += [answer.chunk(c) for c in [add(delta)] if c is not None]
                    continue
                await events(ready)  # those before it
                ready = []
                make = partial(_chunk, answer, add, delta)
                await encoder.send(make, send, before=b"data: ", after=b"\n\n")
            await events(ready)
        if (usage := answer.last_chunk()) is not None:
            await events([usage])
    except ApiError as error:
        failed = error.status
        await events([error.body])
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
    return failed


def _chunk(answer: Answer, add: Callable[[Delta], Any], delta: Delta) -> dict[str, Any]:
    return answer.chunk(add(delta))
