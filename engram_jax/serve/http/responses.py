"""Reads request bodies within limits, sends JSON, and notices clients that disconnect."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope

from engram_jax.serve.http.json_fields import ApiError

OVERRUN = 8  # times the limit of a body is read and thrown away


@dataclass(frozen=True)
class Limits:
    """What one client may ask for.

    body: bytes. seconds: in which the head and then the body of a request must arrive.
    sequences: prompts times n of one request; not more than the engine's queue takes.
    requests: completions at once, before they are queued. retry_after: s, sent with 429 and 503.
    """

    body: int = 1 << 20
    seconds: float = 20.0
    sequences: int = 128
    requests: int = 1000
    retry_after: int = 1


class DisconnectedError(Exception):
    """The client has gone."""


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """All of it, whatever its Content-Length says. Raises ApiError, DisconnectedError.

    Some of what is too much is read, too: a client that still writes does not read the answer.
    """
    close = {"Connection": "close"}  # the rest is not read
    large = ApiError(413, f"body: must have at most {limits.body} bytes", headers=close)
    headers = dict(scope["headers"])
    asks = headers.get(b"expect", b"").lower() == b"100-continue"  # before it writes
    if asks and int(headers.get(b"content-length", b"0")) > limits.body:
        raise large
    size, parts, more = 0, bytearray(), True
    try:
        async with asyncio.timeout(limits.seconds):
            while more and size <= OVERRUN * limits.body:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise DisconnectedError
                size += len(message["body"])
                more = message["more_body"]
                if size <= limits.body:
                    parts += message["body"]
    except TimeoutError:
        if size <= limits.body:
            late = f"body: must arrive within {limits.seconds:g} s"
            raise ApiError(408, late, headers=close) from None
    if size > limits.body:
        raise large
    return bytes(parts)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Await `work`; when the client goes, cancel it and raise DisconnectedError."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = working, _ = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise DisconnectedError
        working.result()
    finally:
        for task in tasks:
            task.cancel()


def dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(dumps(value), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    return json_response(error.body, error.status, error.headers)
