"""What clients do with a connection: half of one, none, thousands, and never reading an answer.

Every test states what such a client gets, and `beside` that a neighbour's stream does not notice.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
import time
from typing import Any, ClassVar

import numpy as np
import pytest

from engram_jax.serve.http import server, uvicorn_internals
from engram_jax.serve.http.responses import Limits
from tests.serve.hostile.neighbour import GOOD, POST, exchange, expected_text, neighbour, post
from tests.serve.served import make_engine
from tests.serve.web import EOS, NAME, QUEUE, Running, head, read_all, read_until, tokenizer

CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
STREAMED = json.dumps({"model": NAME, "prompt": "abc", "max_tokens": 3, "stream": True}).encode()
INCOMPLETE = "ends before its head and body are complete"


@pytest.fixture(scope="module")
def few():
    """Takes 12 connections at once, and 1 MiB of bodies that arrive."""
    yield from running(Limits(seconds=20, sequences=QUEUE, connections=12, bodies=1 << 20))


@pytest.fixture(scope="module")
def impatient():
    """Answers two requests at once; their clients must read something every second."""
    yield from running(Limits(seconds=1, sequences=QUEUE, requests=2))


def running(limits):
    engine = make_engine(tokenizer=tokenizer(), eos_id=EOS, queue=QUEUE)
    with Running(engine, limits) as web:
        yield web
    engine.close()


HALF_CLOSED = {
    "a request": (post(), 200, '"choices"'),
    "a stream": (post(STREAMED), 200, "data: [DONE]"),
    "in chunks": (CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(GOOD), GOOD), 200, '"choices"'),
    "no body": (GET, 200, '"ok"'),
    "HTTP/1.0": (post().replace(b"HTTP/1.1", b"HTTP/1.0"), 200, '"choices"'),
    "closing": (post(GOOD, b"Connection: close"), 200, '"choices"'),
    "a wrong field": (post(b'{"model": 3}'), 400, "model = 3"),
    "no route": (b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n", 404, "no such route"),
    "half a head": (b"GET /health HTTP/1.1\r\nHo", 400, INCOMPLETE),
    "half a first line": (b"GET /hea", 400, INCOMPLETE),
    "a head without its body": (head(10), 400, INCOMPLETE),
    "half a body": (head(10) + b"abc", 400, INCOMPLETE),
    "half a chunk": (CHUNKED + b"a\r\nabc", 400, INCOMPLETE),
    "no last chunk": (CHUNKED + b"3\r\nabc\r\n", 400, INCOMPLETE),
    "half a body for a route without one": (
        b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc",
        None,  # it is answered before the body's end, and may be told that this is missing
        "",
    ),
}


@pytest.mark.parametrize(("sent", "status", "words"), HALF_CLOSED.values(), ids=HALF_CLOSED)
def test_a_client_that_only_reads(web, beside, sent, status, words):
    """Its side of the connection is closed: it is answered, and then the connection ends."""
    answer = exchange(web, sent, only_reads=True).answer
    assert answer.status == status or (status is None and answer.status in (200, 400))
    assert words in answer.body.decode()
    if status != 200:
        assert status is None or answer.error


@pytest.mark.parametrize("count", [2, 5])
def test_several_requests_and_then_only_reading(web, beside, count):
    made = web.raw(post() * count)
    made.shutdown(socket.SHUT_WR)
    assert read_all(made).count(b"HTTP/1.1 200 ") == count


def test_several_requests_and_half_a_one(web, beside):
    made = web.raw(post() * 2 + post()[:-3])
    made.shutdown(socket.SHUT_WR)
    got = read_all(made)
    assert got.count(b"HTTP/1.1 200 ") == 2 and got.count(b"HTTP/1.1 400 ") == 1
    assert INCOMPLETE.encode() in got


def test_nothing_and_then_only_reading(web, beside):
    made = web.raw(b"")
    made.shutdown(socket.SHUT_WR)
    assert read_all(made) == b""


def test_while_it_waits_it_reads_that_the_server_goes_on(web, beside):
    """Lines that HTTP/1.1 lets every client read over; they show whether it is still there."""
    body = {"model": NAME, "prompt": "abc", "n": 9, "max_tokens": 20, "ignore_eos": True}
    made = web.raw(post(json.dumps(body).encode()))
    made.shutdown(socket.SHUT_WR)
    got = read_all(made)
    assert re.match(rb"(HTTP/1.1 100 Continue\r\n\r\n)+HTTP/1.1 200 OK\r\n", got)
    assert got.count(b'"finish_reason":"length"') == 9


class TestMany:
    """More connections than there may be: who has waited longest without a request makes room."""

    @pytest.mark.parametrize(
        "sent",
        [b"", b"GET /health HT", head(10), head(10) + b"abc", CHUNKED + b"1\r\na\r\n", GET],
        ids=["nothing", "half a head", "no body", "half a body", "half in chunks", "answered"],
    )
    def test_connections_that_wait(self, few, sent):
        with neighbour(few, expected_text(few)):
            held = [few.raw(sent) for _ in range(40)] if sent != GET else []
            while sent == GET and len(held) < 40:  # a connection waits once it has its answer
                held.append(few.raw(sent))
                assert read_until(held[-1], b'"ok"}').startswith(b"HTTP/1.1 200 ")
            began = time.monotonic()
            assert few.get("/health").status == 200 and few.complete(max_tokens=1).status == 200
            assert time.monotonic() - began < 10  # none of them is waited for
            first = b""
            with contextlib.suppress(ConnectionResetError):  # what it sent had not been read
                # The system keeps those that have sent nothing; they take no one's place.
                first = read_all(held[0]) if sent else b""
                assert sent in (b"", GET) or b"too many connections" in first
            assert not first or sent not in (b"", GET)
            for one in held:
                one.close()

    @pytest.mark.skipif(
        uvicorn_internals.DEFERRED is None, reason="this system hands silent connections over"
    )
    def test_those_that_are_silent_displace_nobody(self, few):
        begun = few.raw(GET[:14])
        silent = [few.raw(b"") for _ in range(40)]
        assert few.get("/health").status == 200
        begun.sendall(GET[14:])
        assert read_until(begun, b'"ok"}').startswith(b"HTTP/1.1 200 ")
        for one in (begun, *silent):
            one.close()

    def test_all_are_at_work(self, few):
        """The newest is refused, and told why."""
        body = {"model": NAME, "prompt": "abc", "n": 5, "max_tokens": 60, "ignore_eos": True}
        body |= {"stream": True}
        busy = [few.raw(post(json.dumps(body).encode())) for _ in range(12)]
        try:
            deadline = time.monotonic() + 30
            while (stats := few.runner.stats())["running"] + stats["waiting"] < 12 * 5 - 3:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            got = read_all(few.raw(b"G"))
            assert got.startswith(b"HTTP/1.1 503 ")
            assert b"too many connections" in got
            for one in busy:
                assert one.recv(12) == b"HTTP/1.1 200"
        finally:
            for one in busy:
                one.close()

    def test_bodies_that_arrive_slowly(self, few):
        """Together they may hold 1 MiB: the largest is given up, and small ones arrive."""
        with neighbour(few, expected_text(few)):
            large = [few.raw(head(700_000) + b" " * 600_000) for _ in range(3)]
            assert few.complete(max_tokens=1).status == 200
            answers = []
            for one in large:
                one.settimeout(5)
                with contextlib.suppress(TimeoutError):
                    answers.append(read_all(one))
                one.close()
            assert len(answers) == 2
            for got in answers:
                assert got.startswith(b"HTTP/1.1 503 ") and b"bodies are arriving" in got
                assert b"retry-after: 1" in got.lower()


class TestReading:
    """Clients that take their answer slowly, or never."""

    BODY: ClassVar[dict[str, Any]] = {
        "model": NAME,
        "prompt": "abc" * 15,
        "echo": True,
        "logprobs": 20,
        "max_tokens": 10,
    }
    LARGE = json.dumps(BODY | {"n": 28, "ignore_eos": True}).encode()

    def connect(self, web, body):
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made.connect(("127.0.0.1", web.port))
        made.sendall(post(body))
        return made

    @pytest.mark.parametrize("stream", [False, True])
    def test_never(self, impatient, stream):
        """The slot is free again, and the connection reset, after the time it has to read some."""
        body = json.dumps(json.loads(self.LARGE) | {"stream": stream}).encode()
        with neighbour(impatient, expected_text(impatient)):
            impatient.idle()  # the neighbour's slot is free: it has only to read
            time.sleep(0.1)
            held = [self.connect(impatient, body) for _ in range(2)]
            deadline, busy = time.monotonic() + 40, 0
            while (answer := impatient.complete(max_tokens=1)).status != 200:
                busy += "2 requests are being answered" in answer.error["message"]
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert busy
            impatient.idle()
        for one in held:
            one.close()

    def test_slowly_is_still_reading(self, impatient):
        made = self.connect(impatient, self.LARGE)
        got = b""
        while not got.endswith(b"\r\n0\r\n\r\n"):
            part = made.recv(1 << 16)
            assert part
            got += part
            if len(got) % 7 == 0:
                time.sleep(0.01)
        assert got.count(b'"finish_reason":"length"') == 28

    def test_an_answer_in_pieces_is_the_same(self, impatient, monkeypatch):
        """The bytes of the large answer are those of one that is encoded at once."""
        fields = self.BODY | {"n": 12, "seed": 3, "prompt": ["abc" * 15, "x"]}
        large = impatient.complete(**{k: v for k, v in fields.items() if k != "model"})
        assert large.headers.get("transfer-encoding") == "chunked"
        parts = [
            impatient.complete(**{**fields, "prompt": p, "model": NAME, "n": 1}).json["choices"][0]
            for p in fields["prompt"]
        ]
        choices = large.json["choices"]
        assert [c["index"] for c in choices] == list(range(24))
        for one, place in zip(parts, (0, 12), strict=True):
            assert choices[place] | {"index": 0} == one
        usage = large.json["usage"]
        assert usage["prompt_tokens"] == 46
        assert usage["total_tokens"] == 46 + usage["completion_tokens"]


def test_a_limit_of_open_files_is_one_line(caplog):
    """asyncio would write a traceback for each connection that it could not accept."""
    handler = uvicorn_internals._Handler()
    with caplog.at_level(logging.ERROR):
        for _ in range(300):
            handler(None, {"message": "accept", "exception": OSError(24, "Too many open files")})
    (record,) = caplog.records
    line = record.getMessage()
    assert "Too many open files" in line and "ulimit -n" in line and "\n" not in line
    assert record.exc_info is None


def test_connections_by_the_limit_of_open_files(monkeypatch):
    def limited(soft):
        monkeypatch.setattr(server.resource, "getrlimit", lambda _: (soft, soft))

    limited(100_000)
    assert server.connections_of(2048) == 2048
    limited(-1)  # none
    assert server.connections_of(2048) == 2048
    limited(1024)
    assert 500 < server.connections_of(2048) < 1024
    limited(99)
    with pytest.raises(server.UserError, match=r"ulimit -n\) is 99: must be at least \d+$"):
        server.connections_of(2048)


def test_arrays_of_prompts_are_counted_before_they_are_read(web, beside):
    """40 requests of 1 MB that no sequence could hold: each is refused by its size."""
    text = "a" * 1_000_000
    ids = np.zeros(300_000, int).tolist()
    began = time.monotonic()
    for prompt, words in ((text, "1000000 bytes"), (ids, "300000 tokens"), ([text], "bytes")):
        for _ in range(4):
            answer = web.complete(prompt)
            assert answer.status == 400 and words in answer.error["message"]
            assert answer.error["code"] == "context_length_exceeded"
    assert time.monotonic() - began < 20
