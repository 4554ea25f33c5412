"""A client that streams while others misbehave, and raw HTTP exchanges."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.serve.web import NAME, Answer, Client

FIELDS = {"prompt": "the €uro", "max_tokens": 6, "temperature": 1.0, "seed": 7, "ignore_eos": True}
GOOD = json.dumps({"model": NAME, "prompt": "abc", "max_tokens": 1}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


def post(body: bytes = GOOD, *headers: bytes) -> bytes:
    """A request with a Content-Length."""
    length = b"Content-Length: %d" % len(body)
    return POST + b"".join(line + b"\r\n" for line in (length, *headers)) + b"\r\n" + body


@contextlib.contextmanager
def neighbour(web: Client, expected: str) -> Iterator[None]:
    """A stream that has begun before the block and ends behind it, with the text `expected`."""
    connection = http.client.HTTPConnection("127.0.0.1", web.port, timeout=60)
    try:
        connection.request(
            "POST", "/v1/completions", json.dumps(FIELDS | STREAM), dict(web.headers)
        )
        answer = connection.getresponse()
        assert answer.status == 200
        first = answer.readline()
        yield
        lines = (first + answer.read()).decode().split("\n\n")
    finally:
        connection.close()
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    choices = [event["choices"][0] for event in events]
    assert "".join(c["text"] for c in choices) == expected
    assert choices[-1]["finish_reason"] == "length"


STREAM: dict[str, Any] = {"model": NAME, "stream": True}


def expected_text(web: Client) -> str:
    """What the neighbour's stream says with nothing beside it."""
    return web.complete(**FIELDS).json["choices"][0]["text"]


@dataclass(frozen=True)
class Exchange:
    """answer: None if the connection was closed without one. open: whether it can be used again."""

    answer: Answer | None
    open: bool


def exchange(web: Client, sent: bytes, *, only_reads: bool = False) -> Exchange:
    """Send bytes, read one answer, and see whether the connection serves another request."""
    made = socket.create_connection(("127.0.0.1", web.port), timeout=30)
    with made, contextlib.suppress(BrokenPipeError):
        with contextlib.suppress(OSError):  # closed while it was written
            made.sendall(sent)
            if only_reads:
                made.shutdown(socket.SHUT_WR)
        answer = _read(made)
        return Exchange(answer, answer is not None and not only_reads and _again(made))
    return Exchange(None, False)


def _read(made: socket.socket) -> Answer | None:
    response = http.client.HTTPResponse(made)
    try:
        response.begin()
        headers = {k.lower(): v for k, v in response.getheaders()}
        return Answer(response.status, headers, response.read())
    except (OSError, http.client.BadStatusLine):
        return None


def _again(made: socket.socket) -> bool:
    try:
        made.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    except OSError:
        return False
    found = _read(made)
    return found is not None and found.status == 200
