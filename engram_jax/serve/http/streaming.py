"""Puts the engine's deltas together and sends them as server-sent events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from starlette.types import Send

from engram_jax.serve.http.completion_response import LISTED, Answer
from engram_jax.serve.http.encode import Encoder
from engram_jax.serve.http.engine_thread import CLOSED, FAILED
from engram_jax.serve.http.json_fields import MISTAKE, ApiError
from engram_jax.serve.http.responses import dumps
from engram_jax.serve.request import Delta, Finish

LOG = logging.getLogger(__name__)
UNREADABLE = "rows of the memory could not be read; the server's log says which"
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
                raise ApiError(500, told(delta.error))
            if delta.finish == Finish.CANCELLED:
                raise ApiError(503, "cancelled: the server is shutting down", code="draining")
            sequences -= delta.finish is not None
        yield arrived


def told(error: str) -> str:
    """What a client is told of a sequence's error: nothing of the server's files."""
    return error if error in (FAILED, CLOSED) else UNREADABLE


async def stream(
    answer: Answer,
    arriving: AsyncIterator[list[tuple[int, Delta]]],
    send: Send,
    encoder: Encoder,
    request_id: str,
) -> int | None:
    """Server-sent events. What goes wrong after the first one is an event, too, which names the
    request; its status is returned."""
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
        await events([error.of_request(request_id).body])
    except Exception:
        LOG.exception("request %s failed", request_id)
        failed = 500
        await events([ApiError(500, MISTAKE).of_request(request_id).body])
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
    return failed


def _chunk(answer: Answer, add: Callable[[Delta], Any], delta: Delta) -> dict[str, Any]:
    return answer.chunk(add(delta))
