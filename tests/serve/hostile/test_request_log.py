"""Request ids on every answer, and the access log's lines, which no client can forge."""

from __future__ import annotations

import io
import logging
import re
import sys
import time

import pytest

from engram_jax.serve.http.exchange import Exchange
from engram_jax.serve.http.responses import Limits, Rules
from engram_jax.serve.http.server_log import log_to_stderr
from tests.serve.hostile.neighbour import GOOD, exchange, post
from tests.serve.web import NAME, QUEUE, Running

MADE = re.compile("[0-9a-f]{32}")
FIELDS = ("client", "method", "path", "status", "seconds", "prompt_tokens", "completion_tokens")
LINE = re.compile(" ".join(rf"{name}=(\S+)" for name in (*FIELDS, "finish", "request_id")))
PATIENT = 0.5  # seconds for a body


@pytest.fixture(scope="module")
def web(web_engine):
    with Running(web_engine, Limits(seconds=PATIENT, sequences=QUEUE)) as running:
        yield running


@pytest.fixture
def logged(caplog):
    """The access log's lines of these requests, as dicts: a line comes when the answer has ended,
    which its client may know a moment earlier."""
    caplog.set_level(logging.INFO, "engram_jax.serve")
    names = (*FIELDS, "finish", "request_id")

    def lines(*ids: str) -> list[dict[str, str]]:
        deadline = time.monotonic() + 20
        while True:
            found = [LINE.fullmatch(record.getMessage()) for record in list(caplog.records)]
            assert all(found)
            told = [dict(zip(names, line.groups(), strict=True)) for line in found if line]
            mine = [line for line in told if line["request_id"] in ids]
            if {line["request_id"] for line in mine} == set(ids):
                return mine
            assert time.monotonic() < deadline, told
            time.sleep(0.01)

    return lines


IDS: list[tuple[list[bytes], bool]] = [
    ([b"a"], True),
    ([b"3fa85f64-5717-4562-b3fc-2c963f66afa6"], True),
    ([b"req:1/2_x.y~=+@{}"], True),
    ([b"a" * 128], True),
    ([b"a" * 129], False),
    ([b""], False),
    ([b"a b"], False),
    ([b"a\tb"], False),
    ([b"\xc3\xa9"], False),
    ([b"a", b"b"], False),
]


@pytest.mark.parametrize(("given", "kept"), IDS)
def test_ids_that_are_kept(web, beside, given, kept):
    found = exchange(web, post(GOOD, *(b"X-Request-Id: " + value for value in given)))
    assert found.answer is not None and found.answer.status == 200 and found.open
    told = found.answer.headers["x-request-id"]
    assert told == given[0].decode() if kept else MADE.fullmatch(told)
    assert found.answer.json["id"] == f"cmpl-{told}"


def test_the_bodys_id_counts_where_the_head_has_none(web, beside):
    answer = web.complete(max_tokens=1, request_id="mine")
    assert (answer.headers["x-request-id"], answer.json["id"]) == ("mine", "cmpl-mine")
    body = GOOD[:-1] + b', "request_id": "mine"}'
    found = exchange(web, post(body, b"X-Request-Id: head"))
    assert found.answer is not None and found.answer.json["id"] == "cmpl-mine"
    assert found.answer.headers["x-request-id"] == "head"


def headed(line: bytes, *more: bytes) -> bytes:
    return b"\r\n".join((line, b"Host: x", b"X-Request-Id: mine", *more, b"", b""))


ANSWERS: list[tuple[bytes, int, bool]] = [
    (post(b"{", b"X-Request-Id: mine"), 400, True),
    (post(b'{"model": 3}', b"X-Request-Id: mine"), 400, True),
    (post(GOOD.replace(NAME.encode(), b"no"), b"X-Request-Id: mine"), 404, True),
    (headed(b"GET /none HTTP/1.1"), 404, True),
    (headed(b"GET /v1/completions HTTP/1.1"), 405, True),
    (headed(b"GET /health HTTP/1.1"), 200, True),
    (headed(b"GET /metrics HTTP/1.1"), 200, True),
    (headed(b"POST /v1/completions HTTP/1.1", b"Content-Length: 5"), 408, True),
    (post(GOOD, b"X-Request-Id: mine", b"Transfer-Encoding: chunked"), 400, True),
    (post(b"x" * (1 << 21), b"X-Request-Id: mine"), 413, True),
    # Of the connection: there is no head to take an id from.
    (headed(b"POST /v1/completions HTTP/1.1", b"Transfer-Encoding: x"), 400, False),
    (b"no HTTP\r\n\r\n", 400, False),
    (b"GET /" + b"a" * 100_000, 400, False),
    (b"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-Id: mine\r\n", 408, False),
]


@pytest.mark.parametrize(("sent", "status", "named"), ANSWERS)
def test_every_answer_has_one_and_a_line(web, beside, logged, sent, status, named):
    found = exchange(web, sent)
    assert found.answer is not None and found.answer.status == status
    told = found.answer.headers["x-request-id"]
    assert told == "mine" if named else MADE.fullmatch(told)
    (line,) = logged(told)
    assert line["status"] == str(status)


def test_what_a_line_says(web, beside, logged):
    answer = web.complete("the €uro", max_tokens=3, n=2, ignore_eos=True, stop="\0")
    streamed = web.complete("secretive", max_tokens=2, stream=True, ignore_eos=True)
    whole, stream = (logged(a.headers["x-request-id"])[0] for a in (answer, streamed))
    assert re.fullmatch(r"127\.0\.0\.1:\d+", whole.pop("client"))
    assert 0 < float(whole.pop("seconds")) < 60
    assert whole == {
        "method": "POST",
        "path": "/v1/completions",
        "status": "200",
        "prompt_tokens": str(answer.json["usage"]["prompt_tokens"]),
        "completion_tokens": "6",
        "finish": "length:2",
        "request_id": answer.headers["x-request-id"],
    }
    assert (stream["prompt_tokens"], stream["completion_tokens"]) == ("9", "2")
    assert not any("secret" in value for value in stream.values())


def test_a_client_that_goes_has_a_line(web, beside, logged):
    made = web.begin(n=QUEUE, max_tokens=60, ignore_eos=True, stream=True, request_id="gone")
    assert b"200 OK" in made.recv(100)
    made.close()
    (line,) = logged("gone")
    assert line["status"] == "499" and "cancelled:" in line["finish"]


FORGED: list[tuple[bytes, str]] = [
    (b"GET /a%0aINFO%20client=1 HTTP/1.1", "/a%0aINFO%20client=1"),
    (b"GET /a%0d%0a%1b[2J%00 HTTP/1.1", "/a%0d%0a%1b[2J%00"),
    (b"GET /%e2%80%a8x HTTP/1.1", "/%e2%80%a8x"),
    (b"GET /?key=secret HTTP/1.1", "/"),
    (b"GET /status=200%20finish=x HTTP/1.1", "/status=200%20finish=x"),
    (b"GET /" + b"a" * 1000 + b" HTTP/1.1", "/" + "a" * 199 + "..."),
]


@pytest.mark.parametrize(("line", "path"), FORGED)
def test_paths_that_would_forge_a_line(web, beside, logged, line, path):
    found = exchange(web, headed(line))
    assert found.answer is not None and found.answer.status == 404 and found.open
    (told,) = logged("mine")
    assert told["path"] == path


def test_what_is_logged_is_one_line_each(monkeypatch):
    """By the real handler: control characters in a message, and a traceback that has a text."""
    stream, loggers = io.StringIO(), [logging.getLogger(n) for n in ("engram_jax.serve", "uvicorn")]
    before = [(one.handlers[:], one.propagate, one.level) for one in loggers]
    monkeypatch.setattr(sys, "stderr", stream)
    try:
        log_to_stderr("warning")
        log = logging.getLogger("engram_jax.serve.http.front")
        log.info("not shown")
        log.warning("%s", "a\r\n2026-01-01T00:00:00.000Z INFO forged\x1b[2J\u2028")
        try:
            raise ValueError("x\n2026-01-01T00:00:00.000Z INFO forged")
        except ValueError:
            log.exception("request %s failed", "mine")
    finally:
        for one, (handlers, propagate, level) in zip(loggers, before, strict=True):
            one.handlers[:], one.propagate = handlers, propagate
            one.setLevel(level)
    lines = stream.getvalue().splitlines()
    began = [re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (\w+) ", line) for line in lines]
    assert [found[1] for found in began if found] == ["WARNING", "ERROR"]
    assert all(line.isprintable() for line in lines)
    assert all(found or line.startswith("    ") for found, line in zip(began, lines, strict=True))
    assert lines[-1].strip() == "2026-01-01T00:00:00.000Z INFO forged"


def test_a_method_is_shown_within_bounds():
    line = Exchange(request_id="mine").line(("::1", 80), "M" * 1000, "/a b\n\x7fé")
    assert "\n" not in line and len(line) < 600
    assert "path=/a%20b%0A%7F%E9 " in line and "client=::1:80 " in line


def test_no_line_where_none_is_wanted(web_engine, web, caplog):
    caplog.set_level(logging.INFO, "engram_jax.serve")
    web.__exit__()
    try:
        with Running(web_engine, rules=Rules(access_log=False)) as quiet:
            assert quiet.complete(max_tokens=1).headers["x-request-id"]
            assert quiet.stats()['engram_http_responses_total{status="200"}'] == 1
    finally:
        web.__enter__()
    assert not caplog.records
