"""Bodies that are no JSON object of a request, or an odd one. A line a case."""

from __future__ import annotations

import json

import pytest

from tests.serve.web import NAME

REQUEST = {"model": NAME, "prompt": "abc", "max_tokens": 1}
GOOD = json.dumps(REQUEST)


def with_(text: str) -> bytes:
    """The good request with something behind its last field."""
    return (GOOD[:-1] + text + "}").encode()


REFUSED = {
    # body, words of the message
    "nothing": (b"", "not JSON"),
    "spaces": (b"  \r\n\t ", "not JSON"),
    "a NUL": (b"\0", "not JSON"),
    "a number": (b"3", "must be a JSON object"),
    "null": (b"null", "must be a JSON object"),
    "true": (b"true", "must be a JSON object"),
    "a text": (b'"prompt"', "must be a JSON object"),
    "a list of requests": (f"[{GOOD}, {GOOD}]".encode(), "must be a JSON object"),
    "two objects": (f"{GOOD}\n{GOOD}".encode(), "not JSON"),
    "something behind it": (f"{GOOD}x".encode(), "not JSON"),
    "a semicolon behind it": (f"{GOOD};".encode(), "not JSON"),
    "no last brace": (GOOD[:-1].encode(), "not JSON"),
    "a brace too many": (f"{GOOD}}}".encode(), "not JSON"),
    "a comma at the end": (with_(","), "not JSON"),
    "two commas": (with_(',, "n": 1'), "not JSON"),
    "no colon": (with_(', "n" 1'), "not JSON"),
    "no value": (with_(', "n":'), "not JSON"),
    "a name without quotes": (with_(", n: 1"), "not JSON"),
    "single quotes": (GOOD.replace('"', "'").encode(), "not JSON"),
    "a comment": (with_("/* n */"), "not JSON"),
    "a line comment": (with_("// n\n"), "not JSON"),
    "Python's True": (with_(', "echo": True'), "not JSON"),
    "Python's None": (with_(', "stop": None'), "not JSON"),
    "undefined": (with_(', "stop": undefined'), "not JSON"),
    "NaN": (with_(', "temperature": NaN'), "NaN is not JSON"),
    "Infinity": (with_(', "temperature": Infinity'), "Infinity is not JSON"),
    "-Infinity in an unknown field": (with_(', "metadata": [-Infinity]'), "-Infinity is not JSON"),
    "hexadecimal": (with_(', "n": 0x1'), "not JSON"),
    "a leading zero": (with_(', "n": 01'), "not JSON"),
    "a plus": (with_(', "n": +1'), "not JSON"),
    "a point at the end": (with_(', "temperature": 1.'), "not JSON"),
    "a point at the beginning": (with_(', "temperature": .5'), "not JSON"),
    "an underscore": (with_(', "seed": 1_0'), "not JSON"),
    "10,000 digits": (with_(f', "seed": {"9" * 10_000}'), "not JSON"),
    "a fraction with an exponent": (with_(', "temperature": 1e999'), "a number from 0 to 2"),
    "a text that does not end": (with_(', "user": "a'), "not JSON"),
    "a line end in a text": (with_(', "user": "a\nb"'), "not JSON"),
    "a tab in a text": (with_(', "user": "a\tb"'), "not JSON"),
    "an unknown escape": (with_(', "user": "\\x41"'), "not JSON"),
    "half an escape": (with_(', "user": "\\u00"'), "not JSON"),
    "a half pair in the prompt": (
        GOOD.replace("abc", "\\ud83d").encode(),
        "prompt has a lone surrogate",
    ),
    "not UTF-8": (GOOD.encode().replace(b"abc", b"a\xffc"), "not UTF-8 at byte"),
    "Latin-1": (GOOD.replace("abc", "äbc").encode("latin-1"), "not UTF-8 at byte"),
    "a surrogate in UTF-8": (GOOD.encode().replace(b"abc", b"\xed\xa0\x80"), "not UTF-8 at byte"),
    "a long form of a slash": (GOOD.encode().replace(b"abc", b"\xc0\xaf"), "not UTF-8 at byte"),
    "UTF-16": (GOOD.encode("utf-16"), "not UTF-8 at byte"),
    "UTF-32": (GOOD.encode("utf-32-be"), "not JSON"),
    "a byte order mark": (b"\xef\xbb\xbf" + GOOD.encode(), "not JSON"),
    "a field twice": (with_(', "max_tokens": 60'), "body: 'max_tokens' is given more than once"),
    "a field twice, the same": (with_(', "max_tokens": 1'), "'max_tokens' is given more than once"),
    "an escaped name twice": (
        with_(', "m\\u0061x_tokens": 2'),
        "'max_tokens' is given more than once",
    ),
    "twice within a field": (
        with_(', "logit_bias": {"1": 1, "1": 2}'),
        "'1' is given more than once",
    ),
    "nested in lists": (with_(', "stop": ' + "[" * 100_000 + "]" * 100_000), "nested too deeply"),
    "nested in objects": (
        with_(', "user": ' + '{"a":' * 100_000 + "1" + "}" * 100_000),
        "nested too deeply",
    ),
    "XML": (b"<request/>", "not JSON"),
    "YAML": (b"model: unnamed\nprompt: abc\n", "not JSON"),
    "a form": (b"model=unnamed&prompt=abc", "not JSON"),
    "parts": (b'--a\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nabc\r\n', "not JSON"),
    "an empty object": (b"{}", "model = null: must be a text"),
}


@pytest.mark.parametrize(("body", "words"), REFUSED.values(), ids=REFUSED)
def test_a_body_that_is_refused(web, beside, body, words):
    answer = web.send("POST", "/v1/completions", body)
    assert answer.status == 400 and words in answer.error["message"], answer.error["message"]
    assert answer.error["type"] == "invalid_request_error"


SERVED = {
    "spaces around": f" \r\n{GOOD}\t\n".encode(),
    "escaped names": GOOD.replace("prompt", "\\u0070rompt").encode(),
    "an escaped pair": with_(', "user": "\\ud83d\\ude00"'),
    "an escaped NUL": with_(', "user": "\\u0000"'),
    "capitals in an exponent": with_(', "temperature": 10E-1'),
    "minus zero": with_(', "presence_penalty": -0.0'),
    "a float that is nearly nothing": with_(', "temperature": 1e-320'),
    "unusual spaces in a text": with_(', "user": "\u2028\u2029\u00a0\ufeff"'),
    "fields in any order": json.dumps(dict(reversed(REQUEST.items()))).encode(),
    "a value of null": with_(', "stop": null'),
}


@pytest.mark.parametrize("body", SERVED.values(), ids=SERVED)
def test_a_body_that_is_odd_and_served(web, beside, body):
    answer = web.send("POST", "/v1/completions", body)
    assert answer.status == 200, answer.body
    assert answer.json["choices"][0]["finish_reason"] in ("length", "stop")
