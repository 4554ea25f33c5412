"""Reads request bodies within limits, makes JSON answers, and notices clients that disconnect."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope

from engram_jax.serve.http.arriving import Arriving, full
from engram_jax.serve.http.json_fields import ApiError

OVERRUN = 8  # times the limit of a body is read and thrown away
CLOSE = {"Connection": "close"}  # the rest is not read


@dataclass(frozen=True)
class Limits:
    """What one client may ask for.

    body: bytes. bodies: bytes of all bodies that are still arriving.
    seconds: in which the head and then the body of a request must arrive, and in which a client
      must take some of an answer that waits for it.
    sequences: prompts times n of one request; not more than the engine's queue takes.
    answer: tokens and log-probabilities that one answer may list (serve/http/bounds.py). answers:
      all that are under way, but the small ones.
    requests: completions at once whose bodies have arrived. connections: at once, with or without
      a request. retry_after: s, sent with 429 and 503.
    """

    body: int = 1 << 20
    bodies: int = 64 << 20
    seconds: float = 20.0
    sequences: int = 128
    answer: int = 1 << 20
    answers: int = 1 << 23
    requests: int = 1000
    connections: int = 2048
    retry_after: int = 1


@dataclass(frozen=True)
class Rules:
    """Who may ask, and what is noted of it.

    api_keys: () = everyone. cors_origins: whose pages may ask. access_log: a line per request.
    """

    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    access_log: bool = True


class DisconnectedError(Exception):
    """The client has gone."""


def check_framing(scope: Scope) -> None:
    """A request that says its length twice (RFC 9112, section 6.3) may be two to a proxy in front:
    it is refused, and its connection closed. So is one of another version. Raises ApiError."""
    if scope["http_version"] not in ("1.0", "1.1"):
        message = f"HTTP/{scope['http_version']}: must be HTTP/1.1"
        raise ApiError(505, message, headers=CLOSE)
    names = {name for name, _ in scope["headers"]}
    if {b"content-length", b"transfer-encoding"} <= names:
        message = "Content-Length and Transfer-Encoding: only one of them may be sent"
        raise ApiError(400, message, headers=CLOSE)


async def read_body(
    scope: Scope, receive: Receive, limits: Limits, arriving: Arriving | None = None
) -> bytes:
    """All of it, whatever its Content-Length says. Raises ApiError, DisconnectedError.

    Some of what is too much is read, too: a client that still writes does not read the answer.
    arriving: of all bodies, which together may hold `limits.bodies` bytes.
    """
    large = ApiError(413, f"body: must have at most {limits.body} bytes", headers=CLOSE)
    headers = dict(scope["headers"])
    asks = headers.get(b"expect", b"").lower() == b"100-continue"  # before it writes
    if asks and int(headers.get(b"content-length", b"0")) > limits.body:
        raise large
    size, parts, more = 0, bytearray(), True
    try:
        async with asyncio.timeout(limits.seconds) as timeout:
            with (arriving or Arriving(limits.body)).one(timeout) as body:
                while more and size <= OVERRUN * limits.body:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise DisconnectedError
                    size += len(message["body"])
                    more = message["more_body"]
                    await body.paced(len(message["body"]))
                    if size <= limits.body:
                        body.grow(len(message["body"]))
                        parts += message["body"]
    except TimeoutError:
        if body.given_up:
            raise full() from None
        if size <= limits.body:
            late = f"body: must arrive within {limits.seconds:g} s"
            raise ApiError(408, late, headers=CLOSE) from None
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
        await asyncio.wait(tasks)  # what was cut off is noted before its line is logged


def dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(dumps(value), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    return json_response(error.body, error.status, error.headers)
