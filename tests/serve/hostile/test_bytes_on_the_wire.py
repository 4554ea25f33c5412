"""Bytes that are no request, or an odd one: what is answered, and whether the connection goes on.

A line a case: what is sent, the status, words of the message, and the connection afterwards.
"""

from __future__ import annotations

import gzip

import pytest

from tests.serve.hostile.neighbour import GOOD, POST, exchange, post

OPEN, CLOSED = True, False
NOT_HTTP = "not an HTTP/1.1 request"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(GOOD), GOOD)
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"


def length(value: bytes, body: bytes = GOOD) -> bytes:
    return POST + b"Content-Length: " + value + b"\r\n\r\n" + body


N = b"%d" % len(GOOD)

LENGTHS = {
    "both lengths": (
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS,
        400,
        "only one of them",
        CLOSED,
    ),
    "both lengths, the other first": (
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: " + N + b"\r\n\r\n" + CHUNKS,
        400,
        "only one of them",
        CLOSED,
    ),
    "both lengths, a request hidden behind": (
        POST + b"Content-Length: 500\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS + post(),
        400,
        "only one of them",
        CLOSED,
    ),
    "both lengths for a route without a body": (
        GET + b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
        "only one of them",
        CLOSED,
    ),
    "both lengths for no route": (
        b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\n",
        400,
        "only one of them",
        CLOSED,
    ),
    "gzip, chunked": (
        POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKS,
        400,
        NOT_HTTP,
        CLOSED,
    ),
    "identity": (POST + b"Transfer-Encoding: identity\r\n\r\n" + GOOD, 400, NOT_HTTP, CLOSED),
    "chunked twice": (
        POST + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n" + CHUNKS,
        400,
        NOT_HTTP,
        CLOSED,
    ),
    "chunked, spelled otherwise": (
        POST + b"transfer-ENCODING: Chunked\r\n\r\n" + CHUNKS,
        200,
        "",
        OPEN,
    ),
    "no length": (POST + b"\r\n", 400, "not JSON", OPEN),
    "a length that is empty": (length(b""), 400, NOT_HTTP, CLOSED),
    "with a sign": (length(b"+" + N), 400, NOT_HTTP, CLOSED),
    "hexadecimal": (length(b"0x20"), 400, NOT_HTTP, CLOSED),
    "a fraction": (length(N + b".0"), 400, NOT_HTTP, CLOSED),
    "two numbers": (length(N + b" " + N), 400, NOT_HTTP, CLOSED),
    "underscored": (length(b"1_0"), 400, NOT_HTTP, CLOSED),
    "of other digits": (length("٣".encode()), 400, NOT_HTTP, CLOSED),
    "a list of two": (length(N + b", 3"), 400, NOT_HTTP, CLOSED),
    "a list of the same": (length(N + b", " + N), 200, "", OPEN),
    "of 30 digits": (length(b"9" * 30), 400, NOT_HTTP, CLOSED),
    "with leading zeros": (length(b"000" + N), 200, "", OPEN),
    "with spaces around": (length(b"  " + N + b"  "), 200, "", OPEN),
    "shorter than the body": (length(b"10"), 400, "not JSON", CLOSED),  # the rest is no request
}

CHUNK = {
    "chunks": (CHUNKED + CHUNKS, 200, "", OPEN),
    "a byte each": (
        CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in GOOD) + b"0\r\n\r\n",
        200,
        "",
        OPEN,
    ),
    "with an extension": (
        CHUNKED + CHUNKS.replace(b"\r\n", b";a=b\r\n", 1),
        200,
        "",
        OPEN,
    ),
    "with a trailer": (CHUNKED + CHUNKS[:-2] + b"A: b\r\n\r\n", 200, "", OPEN),
    "a size in capitals with zeros": (
        CHUNKED + b"000" + CHUNKS[:2].upper() + CHUNKS[2:],
        200,
        "",
        OPEN,
    ),
    "only the last": (CHUNKED + b"0\r\n\r\n", 400, "not JSON", OPEN),
    "a size with a sign": (CHUNKED + b"+" + CHUNKS, 400, NOT_HTTP, CLOSED),
    "a negative size": (CHUNKED + b"-" + CHUNKS, 400, NOT_HTTP, CLOSED),
    "a size with 0x": (CHUNKED + b"0x" + CHUNKS, 400, NOT_HTTP, CLOSED),
    "an empty size": (CHUNKED + b"\r\n" + CHUNKS, 400, NOT_HTTP, CLOSED),
    "a size of 30 digits": (CHUNKED + b"f" * 30 + b"\r\n", 400, NOT_HTTP, CLOSED),
    "longer than its size": (CHUNKED + b"2\r\nabc\r\n0\r\n\r\n", 400, NOT_HTTP, CLOSED),
    "a size that never ends": (CHUNKED + b"0" * 70_000, 400, NOT_HTTP, CLOSED),
    "a trailer that is no header": (CHUNKED + CHUNKS[:-2] + b"A b\r\n\r\n", 400, NOT_HTTP, CLOSED),
}

FIRST_LINES = {
    "a word": (b"nonsense\r\n\r\n", 400, NOT_HTTP, CLOSED),
    "only line ends": (b"\r\n" * 5 + GET + b"\r\n", 400, NOT_HTTP, CLOSED),
    "a method in small letters": (
        b"get /health HTTP/1.1\r\nHost: x\r\n\r\n",
        405,
        "must be GET",
        OPEN,
    ),
    "an unknown method": (b"BREW /health HTTP/1.1\r\nHost: x\r\n\r\n", 405, "must be GET", OPEN),
    "a method with a space": (b"G ET /health HTTP/1.1\r\nHost: x\r\n\r\n", 400, NOT_HTTP, CLOSED),
    "a method of symbols": (b"(GET) / HTTP/1.1\r\nHost: x\r\n\r\n", 400, NOT_HTTP, CLOSED),
    "HTTP/0.9": (b"GET /health\r\n\r\n", 400, NOT_HTTP, CLOSED),
    "HTTP/1.0": (b"GET /health HTTP/1.0\r\n\r\n", 200, "", CLOSED),
    "HTTP/2's preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "must be HTTP/1.1", CLOSED),
    "HTTP/3.0": (GET.replace(b"1.1", b"3.0") + b"\r\n", 505, "must be HTTP/1.1", CLOSED),
    "HTTP/1.2": (GET.replace(b"1.1", b"1.2") + b"\r\n", 505, "must be HTTP/1.1", CLOSED),
    "HTTP/1.11": (GET.replace(b"1.1", b"1.11") + b"\r\n", 400, NOT_HTTP, CLOSED),
    "another protocol": (GET.replace(b"HTTP", b"RTSP") + b"\r\n", 400, NOT_HTTP, CLOSED),
    "no target": (b"GET HTTP/1.1\r\nHost: x\r\n\r\n", 400, NOT_HTTP, CLOSED),
    "two spaces": (b"GET  /health HTTP/1.1\r\nHost: x\r\n\r\n", 400, NOT_HTTP, CLOSED),
    "tabs": (b"GET\t/health\tHTTP/1.1\r\nHost: x\r\n\r\n", 400, NOT_HTTP, CLOSED),
    "a NUL in the target": (b"GET /he\0alth HTTP/1.1\r\nHost: x\r\n\r\n", 400, NOT_HTTP, CLOSED),
    "an escaped NUL": (b"GET /he%00alth HTTP/1.1\r\nHost: x\r\n\r\n", 404, "no such route", OPEN),
    "an escape that is none": (b"GET /%zz HTTP/1.1\r\nHost: x\r\n\r\n", 404, "no such route", OPEN),
    "escaped bytes": (b"GET /%ff%fe HTTP/1.1\r\nHost: x\r\n\r\n", 404, "no such route", OPEN),
    "not ASCII": ("GET /ü HTTP/1.1\r\nHost: x\r\n\r\n".encode(), 400, NOT_HTTP, CLOSED),
    "a target of 400 kB": (
        b"GET /" + b"x" * 400_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        400,
        NOT_HTTP,
        CLOSED,
    ),
    "a target of 10 kB": (
        b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        404,
        "no such route",
        OPEN,
    ),
    "dots": (b"GET /v1/../health HTTP/1.1\r\nHost: x\r\n\r\n", 404, "no such route", OPEN),
    "two slashes": (b"GET //health HTTP/1.1\r\nHost: x\r\n\r\n", 404, "no such route", OPEN),
    "a query": (b"GET /health?a=b&c HTTP/1.1\r\nHost: x\r\n\r\n", 200, "", OPEN),
    "a fragment": (b"GET /health#a HTTP/1.1\r\nHost: x\r\n\r\n", 404, "no such route", OPEN),
    "a whole address": (
        b"GET http://x/health HTTP/1.1\r\nHost: x\r\n\r\n",
        404,
        "no such route",
        OPEN,
    ),
    "a star": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 404, "no such route", OPEN),
    "a tunnel": (b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n", 404, "no such route", OPEN),
    "line feeds alone": ((GET + b"\r\n").replace(b"\r\n", b"\n"), 200, "", OPEN),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xaa" * 500, 400, NOT_HTTP, CLOSED),
    "SSH": (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", 400, NOT_HTTP, CLOSED),
    "NULs": (b"\0" * 100 + b"\r\n\r\n", 400, NOT_HTTP, CLOSED),
    "SMTP": (b"EHLO x\r\nMAIL FROM:<a@b>\r\n\r\n", 400, NOT_HTTP, CLOSED),
}


def header(line: bytes) -> bytes:
    return GET + line + b"\r\n\r\n"


HEADERS = {
    "no Host": (b"GET /health HTTP/1.1\r\n\r\n", 400, NOT_HTTP, CLOSED),
    "two Hosts": (header(b"Host: y"), 400, NOT_HTTP, CLOSED),
    "an empty Host": (b"GET /health HTTP/1.1\r\nHost:\r\n\r\n", 200, "", OPEN),
    "another Host": (b"GET /health HTTP/1.1\r\nHost: a.b:1\r\n\r\n", 200, "", OPEN),
    "no colon": (header(b"Abc"), 400, NOT_HTTP, CLOSED),
    "no name": (header(b": a"), 400, NOT_HTTP, CLOSED),
    "a space before the colon": (header(b"A : b"), 400, NOT_HTTP, CLOSED),
    "a name that is not ASCII": (header("ä: b".encode()), 400, NOT_HTTP, CLOSED),
    "a value that is not ASCII": (header("A: ä€".encode()), 200, "", OPEN),
    "a NUL in a value": (header(b"A: b\0c"), 400, NOT_HTTP, CLOSED),
    "a carriage return in a value": (header(b"A: b\rc"), 400, NOT_HTTP, CLOSED),
    "a line that is continued": (header(b"A: b\r\n c"), 200, "", OPEN),
    "a first line that is continued": (
        b"GET /health HTTP/1.1\r\n c: d\r\nHost: x\r\n\r\n",
        400,
        NOT_HTTP,
        CLOSED,
    ),
    "2,000 of them": (header(b"\r\n".join(b"A%d: b" % i for i in range(2000))), 200, "", OPEN),
    "400 kB of them": (header(b"A: " + b"a" * 400_000), 400, NOT_HTTP, CLOSED),
    "a name of 60 kB": (header(b"A" * 60_000 + b": b"), 200, "", OPEN),
    "closing": (header(b"Connection: close"), 200, "", CLOSED),
    "keeping alive": (header(b"Connection: keep-alive"), 200, "", OPEN),
    "an upgrade to a web socket": (
        header(
            b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
        ),
        200,
        "",
        OPEN,
    ),
    "an upgrade to HTTP/2": (
        header(b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA"),
        200,
        "",
        OPEN,
    ),
    "another content type": (post(GOOD, b"Content-Type: text/plain"), 200, "", OPEN),
    "a form": (post(b"prompt=abc", b"Content-Type: a/x-www-form-urlencoded"), 400, "JSON", OPEN),
    "gzip": (post(gzip.compress(GOOD), b"Content-Encoding: gzip"), 400, "not UTF-8", OPEN),
    "an expectation": (post(GOOD, b"Expect: 200-ok"), 200, "", OPEN),
    "credentials": (post(GOOD, b"Authorization: Bearer none"), 200, "", OPEN),
    "another type wanted": (post(GOOD, b"Accept: text/html"), 200, "", OPEN),
    "a range": (header(b"Range: bytes=0-1"), 200, "", OPEN),
    "forwarded": (header(b"X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Proto: https"), 200, "", OPEN),
    "a cookie": (header(b"Cookie: a=b"), 200, "", OPEN),
}

CASES = {
    f"{kind}: {name}": case
    for kind, cases in [
        ("length", LENGTHS),
        ("chunks", CHUNK),
        ("first line", FIRST_LINES),
        ("header", HEADERS),
    ]
    for name, case in cases.items()
}


@pytest.mark.parametrize(("sent", "status", "words", "connection"), CASES.values(), ids=CASES)
def test_is_answered(web, beside, sent, status, words, connection):
    found = exchange(web, sent)
    if found.answer is None:  # closed before it had read all: the system may drop the answer
        assert status == 400 and len(sent) > 60_000
        return
    assert found.answer.status == status
    if status != 200:
        assert words in found.answer.error["message"]
        kind = "invalid_request_error" if status < 500 else "server_error"
        assert found.answer.error["type"] == kind
    assert found.open == connection


ROUTES = ["/v1/completions", "/v1/models", "/v1/models/unnamed", "/health", "/metrics"]
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("route", ROUTES)
def test_methods(web, beside, method, route):
    allowed = ["POST"] if route == "/v1/completions" else ["GET", "HEAD"]
    sent = f"{method} {route} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    if method == "HEAD":  # no body to read
        answer = web.send(method, route)
        assert answer.status == (200 if method in allowed else 405) and answer.body == b""
        return
    answer = exchange(web, sent).answer
    if method not in allowed:
        assert answer.status == 405 and answer.headers["allow"]
        assert "must be" in answer.error["message"]
    else:
        assert answer.status == (400 if method == "POST" else 200)
