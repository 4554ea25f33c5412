"""Requests with and without a key, from pages of other origins: who is answered, and with what.

A line of a table is a case. Each states the status and the message, that the connection serves the
next request, and that a neighbour's stream survived.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time

import pytest

from engram_jax.config import ServeConfig
from engram_jax.config.errors import UserError
from engram_jax.config.serving_schema import HIDDEN
from engram_jax.serve.http import uvicorn_internals
from engram_jax.serve.http.api_keys import api_keys
from engram_jax.serve.http.responses import Rules
from tests.serve.hostile.neighbour import GOOD, exchange, post
from tests.serve.web import Running

KEYS = ("sk-first", "sk-second")
ORIGIN = "https://pages.example:8443"
MESSAGE = "Authorization: must be 'Bearer KEY' with one of the server's API keys"


@pytest.fixture(scope="module")
def web(web_engine):
    with Running(web_engine, rules=Rules(KEYS, (ORIGIN,))) as running:
        yield running


def authorization(value: bytes) -> bytes:
    return b"Authorization: " + value


WRONG: list[tuple[list[bytes], str]] = [
    ([], "Bearer"),
    ([b"X-API-Key: sk-first"], "Bearer"),
    ([b"Proxy-Authorization: Bearer sk-first"], "Bearer"),
    ([b"Cookie: Authorization=Bearer sk-first"], "Bearer"),
    ([authorization(b"Bearer sk-third")], 'Bearer error="invalid_token"'),
    ([authorization(b"Bearer sk-firs")], 'Bearer error="invalid_token"'),
    ([authorization(b"Bearer sk-firstt")], 'Bearer error="invalid_token"'),
    ([authorization(b"Bearer SK-FIRST")], 'Bearer error="invalid_token"'),
    ([authorization(b"Bearer sk-first,sk-second")], 'Bearer error="invalid_token"'),
    ([authorization(b"Bearer sk-first sk-second")], 'Bearer error="invalid_token"'),
    ([authorization(b'Bearer "sk-first"')], 'Bearer error="invalid_token"'),
    ([authorization(b"Bearer")], 'Bearer error="invalid_token"'),
    ([authorization(b"")], 'Bearer error="invalid_token"'),
    ([authorization(b"sk-first")], 'Bearer error="invalid_token"'),
    ([authorization(b"Bearersk-first")], 'Bearer error="invalid_token"'),
    ([authorization(b"Basic c2stZmlyc3Q6")], 'Bearer error="invalid_token"'),
    (
        [authorization(b"Basic sk-first")],
        'Bearer error="invalid_token"',
    ),  # right but for its scheme
    ([authorization(b"Bearer \xff\xfe")], 'Bearer error="invalid_token"'),
    ([authorization(b"Bearer " + b"a" * 50_000)], 'Bearer error="invalid_token"'),
    ([authorization(b"Bearer sk-first")] * 2, 'Bearer error="invalid_token"'),
]


@pytest.mark.parametrize(("lines", "challenge"), WRONG)
def test_without_a_key(web, beside, lines, challenge):
    found = exchange(web, post(GOOD, *lines))
    assert found.answer is not None and found.answer.status == 401
    assert found.answer.error["message"] == MESSAGE
    assert found.answer.error["code"] == "invalid_api_key"
    assert found.answer.error["type"] == "invalid_request_error"
    assert found.answer.headers["www-authenticate"] == challenge
    assert found.open


@pytest.mark.parametrize(
    "value", [b"Bearer sk-first", b"bearer sk-second", b"BEARER   sk-first", b"Bearer sk-second  "]
)
def test_with_a_key(web, beside, value):
    found = exchange(web, post(GOOD, authorization(value)))
    assert found.answer is not None and found.answer.status == 200 and found.open


PATHS = [
    *("GET /v1/models", "GET /v1/models/unnamed", "POST /v1/completions", "POST /tokenize"),
    *("POST /detokenize", "POST /v1/chat/completions", "GET /", "GET /none", "GET //health"),
    *("GET /health/", "GET /HEALTH", "GET /health/../v1/models", "GET /health%2f..%2fv1/models"),
    *("GET /v1/models?x=/health", "GET /metrics/x", "OPTIONS /v1/completions", "HEAD /v1/models"),
]


@pytest.mark.parametrize("line", PATHS)
def test_paths_that_need_a_key(web, beside, line):
    method, path = line.split(" ", 1)
    answer = web.send(method, path, headers={})
    assert answer.status == 401
    if method != "HEAD":
        assert answer.error["message"] == MESSAGE


@pytest.mark.parametrize("path", ["/health", "/version", "/metrics", "/health?x=1"])
def test_paths_that_need_none(web, beside, path):
    assert web.send("GET", path, headers={}).status == 200


@pytest.mark.parametrize("lines", [[], [b"Expect: 100-continue"]])
def test_no_body_is_waited_for(web, beside, lines):
    """Nor asked for: the answer to a head without a key is the first thing that is sent."""
    began = time.monotonic()
    sent = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n"
    with web.raw(sent + b"".join(line + b"\r\n" for line in lines) + b"\r\n") as made:
        assert made.recv(100).startswith(b"HTTP/1.1 401")
    assert time.monotonic() - began < 0.9  # a body has a second here


def test_a_body_that_comes_all_the_same_is_not_read_for_ever(web, beside):
    piece = b"x" * (1 << 16)
    sent = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n"
    with web.raw(sent) as made:
        made.recv(100)
        total = 0
        with contextlib.suppress(ConnectionError):
            while total < 1_000_000_000:
                made.sendall(piece)
                total += len(piece)
    held = 8 << 20  # what the system's buffers may take, both sides
    assert total < uvicorn_internals.DISCARDED + held


# ---- other origins -------------------------------------------------------------------------------

PREFLIGHT: list[tuple[str, str, str, int, str]] = [
    (ORIGIN, "POST", "authorization,content-type", 200, "OK"),
    (ORIGIN, "GET", "", 200, "OK"),
    (ORIGIN, "DELETE", "", 400, "preflight: Disallowed CORS method"),
    ("https://pages.example", "POST", "", 400, "preflight: Disallowed CORS origin"),
    ("http://pages.example:8443", "POST", "", 400, "preflight: Disallowed CORS origin"),
    (f"{ORIGIN}.evil.example", "POST", "", 400, "preflight: Disallowed CORS origin"),
    ("null", "POST", "", 400, "preflight: Disallowed CORS origin"),
]


@pytest.mark.parametrize(("origin", "method", "asked", "status", "words"), PREFLIGHT)
def test_preflight(web, beside, origin, method, asked, status, words):
    """Browsers send no key with it."""
    headers = {"Origin": origin, "Access-Control-Request-Method": method}
    headers |= {"Access-Control-Request-Headers": asked} if asked else {}
    answer = web.send("OPTIONS", "/v1/completions", headers=headers)
    assert answer.status == status
    allowed = answer.headers.get("access-control-allow-origin")
    if status == 200:
        assert answer.body.decode() == words and allowed == origin
        assert answer.headers.get("access-control-allow-headers", "") == asked or not asked
        assert set(answer.headers["access-control-allow-methods"].split(", ")) == {"GET", "POST"}
    else:
        assert answer.error["message"] == words
        assert allowed == (origin if origin == ORIGIN else None)
    assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize(("origin", "allowed"), [(ORIGIN, ORIGIN), ("https://evil.example", None)])
def test_pages_of_other_origins(web, beside, origin, allowed):
    """Whole, streamed and refused: a browser shows its page what the header allows."""
    headers = {**web.headers, "Origin": origin}
    whole = web.send("POST", "/v1/completions", GOOD, headers)
    stream = json.dumps(json.loads(GOOD) | {"stream": True})
    streamed = web.send("POST", "/v1/completions", stream, headers)
    refused = web.send("POST", "/v1/completions", GOOD, {"Origin": origin})
    assert [a.status for a in (whole, streamed, refused)] == [200, 200, 401]
    assert streamed.events[-1]["choices"][0]["finish_reason"]
    for answer in (whole, streamed, refused):
        assert answer.headers.get("access-control-allow-origin") == allowed
        assert answer.headers["vary"] == "Origin"


def test_without_origins_nothing_is_allowed(web_engine, web):
    """The default: no header, and OPTIONS is a method like others."""
    web.__exit__()
    try:
        with Running(web_engine) as plain:
            answer = plain.send("GET", "/v1/models", headers={"Origin": ORIGIN})
            assert answer.status == 200 and "access-control-allow-origin" not in answer.headers
            asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
            assert plain.send("OPTIONS", "/v1/completions", headers=asked).status == 405
    finally:
        web.__enter__()


# ---- where keys are read from --------------------------------------------------------------------


def test_keys_come_from_three_places(tmp_path):
    file = tmp_path / "keys"
    file.write_text("sk-3\n\n  sk-4  \nsk-1\n")
    serve = ServeConfig(api_key=("sk-1",), api_key_file=str(file))
    assert api_keys(serve, {"ENGRAM_API_KEY": "sk-2, sk-1"}) == ("sk-1", "sk-2", "sk-3", "sk-4")
    assert api_keys(ServeConfig(), {}) == ()
    # A run's own configuration says that there were keys, and not which.
    hidden = ServeConfig(api_key=(HIDDEN,))
    assert api_keys(hidden, {"ENGRAM_API_KEY": "sk-2"}) == ("sk-2",)


UNUSABLE: list[tuple[dict, dict, str, str]] = [
    ({}, {"ENGRAM_API_KEY": ""}, "", "$ENGRAM_API_KEY: has no key"),
    ({}, {"ENGRAM_API_KEY": "secret,"}, "", "$ENGRAM_API_KEY: has no key, or one that is not"),
    ({}, {"ENGRAM_API_KEY": "secret key"}, "", "visible characters of ASCII"),
    ({}, {"ENGRAM_API_KEY": "secrét"}, "", "visible characters of ASCII"),
    ({}, {"ENGRAM_API_KEY": "secret" * 200}, "", "1 to 1024"),
    ({"api_key_file": "FILE"}, {}, "", "keys: has no key"),
    ({"api_key_file": "FILE"}, {}, "\n \n", "keys: has no key"),
    ({"api_key_file": "FILE"}, {}, "good\nsecret key\n", "keys: has no key, or one that is not"),
    ({"api_key_file": "/none"}, {}, "", "config.serve.api_key_file /none: No such file"),
    ({"api_key_file": "/dev/zero"}, {}, "", "is a device, must be a file"),
    ({"api_key_file": "gs://b/keys"}, {}, "", "must be a path of this machine"),
    ({"api_key": (HIDDEN,)}, {}, "", "had keys, which no record has: give them again"),
]


@pytest.mark.parametrize(("serve", "environment", "content", "words"), UNUSABLE)
def test_places_without_a_usable_key(serve, environment, content, words, tmp_path):
    """One line, which shows no key."""
    file = tmp_path / "keys"
    file.write_text(content)
    serve = {key: str(file) if value == "FILE" else value for key, value in serve.items()}
    with pytest.raises(UserError) as caught:
        api_keys(ServeConfig(**serve), environment)
    line = str(caught.value)
    assert words in line and line.isprintable() and "secret" not in line


def test_closed_sockets_are_no_error(web, beside):
    """A client that leaves at once, with and without a key."""
    for lines in ([], [authorization(b"Bearer sk-first")]):
        made = socket.create_connection(("127.0.0.1", web.port))
        made.sendall(post(GOOD, *lines))
        made.close()
    assert web.get("/health").status == 200
