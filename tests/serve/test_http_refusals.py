"""What a client can get wrong, and that it is told in one line: fields, bodies, bytes."""

from __future__ import annotations

import json
import random

import pytest

from tests.serve.web import NAME, QUEUE, head, read_all
from tests.tiny import VOCAB

WRONG = [
    # fields, the parameter that is named, words of the message
    ({"prompt": None}, "prompt", "a text, a list"),
    ({"prompt": []}, "prompt", "a list of 0"),
    ({"prompt": 3}, "prompt", "= 3"),
    ({"prompt": {"a": 1}}, "prompt", "an object"),
    ({"prompt": ["a", 1]}, "prompt", "must be"),
    ({"prompt": [1, "a"]}, "prompt", "must be"),
    ({"prompt": [True]}, "prompt", "must be"),
    ({"prompt": [1.0]}, "prompt", "must be"),
    ({"prompt": [[1, -1]]}, "prompt", "must be"),
    ({"prompt": [10**30]}, "prompt", "must be"),
    ({"prompt": [VOCAB]}, None, f"must be from 0 to {VOCAB - 1}"),
    ({"prompt": ["a"] * (QUEUE + 1)}, "prompt", f"at most {QUEUE}"),
    ({"prompt": ["a"] * 5, "n": QUEUE // 4}, "prompt", "at most 4 prompts"),
    ({"prompt": "a\ud800"}, "prompt", "surrogate"),
    ({"prompt": "a" * 65}, "prompt", "has 65 tokens; must be from 1 to 63"),
    ({"prompt": "a" * 64}, "prompt", "has 64 tokens"),
    ({"prompt": "a" * 1000}, "prompt", "has 1000 tokens"),
    ({"max_tokens": 0}, "max_tokens", "from 1 to"),
    ({"max_tokens": -1}, "max_tokens", "from 1 to"),
    ({"max_tokens": 62}, "max_tokens", "must be from 1 to 61"),
    ({"max_tokens": 10**400}, "max_tokens", "must be"),
    ({"max_tokens": True}, "max_tokens", "= true: must be"),
    ({"max_tokens": 3.5}, "max_tokens", "= 3.5: must be"),
    ({"max_tokens": "3"}, "max_tokens", "= '3': must be"),
    ({"temperature": -0.1}, "temperature", "from 0 to 2"),
    ({"temperature": 2.1}, "temperature", "from 0 to 2"),
    ({"temperature": True}, "temperature", "a number"),
    ({"temperature": "hot"}, "temperature", "'hot'"),
    ({"temperature": 10**400}, "temperature", "a number"),
    ({"top_p": 0}, "top_p", "a number"),
    ({"top_p": 1.1}, "top_p", "a number"),
    ({"top_k": -2}, "top_k", "from -1"),
    ({"top_k": 10**12}, "top_k", "must be"),
    ({"seed": 0.5}, "seed", "a whole number"),
    ({"seed": 2**63}, "seed", "a whole number"),
    ({"n": 0}, "n", f"from 1 to {QUEUE}"),
    ({"n": QUEUE + 1}, "n", f"from 1 to {QUEUE}"),
    ({"n": 2, "best_of": 3}, "best_of", "1 or n = 2"),
    ({"logprobs": 21}, "logprobs", "from 0 to 20"),
    ({"logprobs": True}, "logprobs", "from 0 to 20"),
    ({"echo": 1}, "echo", "true or false"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream = true"),
    ({"stream": True, "stream_options": 3}, "stream_options", "an object"),
    (
        {"stream": True, "stream_options": {"include_usage": 3}},
        "stream_options.include_usage",
        "true or false",
    ),
    ({"stop": ""}, "stop", "texts of 1 to 1000 characters"),
    ({"stop": ["a", "b" * 1001]}, "stop", "texts of 1 to 1000 characters"),
    ({"stop": ["a", ""]}, "stop", "texts of 1 to 1000 characters"),
    ({"stop": [3]}, "stop", "a text or a list"),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"stop": "\udc00"}, "stop", "surrogate"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids", "token ids"),
    ({"user": 3}, "user", "a text"),
    ({"suffix": "b"}, "suffix", "not supported"),
    ({"model": 3}, "model", "a text"),
    ({"model": None}, "model", "a text"),
]


@pytest.mark.parametrize(("fields", "param", "words"), WRONG)
def test_a_wrong_field(web, fields, param, words):
    answer = web.complete(**fields)
    assert answer.status == 400
    assert answer.error["param"] == param and words in answer.error["message"]
    assert answer.error["type"] == "invalid_request_error"


NAMES = sorted({name for fields, _, _ in WRONG for name in fields} - {"model"})
VALUES = [
    *(None, True, False, 0, 1, 2, -1, 0.5, 1e-320, 1e308, 2**31, 2**32, 2**64, -(10**40), "", "a"),
    *("\x00", "\ud83d", "\U0001f600", [], [[]], [None], [1], [0.5], ["a"], [["a"]], [[1], [2]]),
    *([1, [2]], {}, {"a": {}}, {"include_usage": True}, [2**31], [-1], "é" * 40, [{"a": 1}]),
]


def test_any_value_anywhere(web):
    """Served or refused: never an error of ours."""
    rng, statuses = random.Random(0), set()
    for _ in range(600):
        fields = {name: rng.choice(VALUES) for name in rng.sample(NAMES, rng.randint(1, 3))}
        answer = web.complete(**{"max_tokens": 1, **fields})
        assert answer.status in (200, 400), (fields, answer)
        statuses.add(answer.status)
        if answer.status == 400:
            assert answer.error["type"] == "invalid_request_error"
        elif fields.get("stream"):
            assert answer.events and "error" not in answer.events[-1]
    assert statuses == {200, 400}


BODIES = {
    "nothing": b"",
    "half": b'{"model": "tiny',
    "not an object": b"[1, 2]",
    "a text": b'"model"',
    "NaN": b'{"model": "unnamed", "prompt": "a", "temperature": NaN}',
    "Infinity": b'{"model": "unnamed", "prompt": "a", "top_p": -Infinity}',
    "1e999": b'{"model": "unnamed", "prompt": "a", "temperature": 1e999}',
    "nested": b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "huge integer": b'{"model": "unnamed", "prompt": "a", "seed": ' + b"9" * 10_000 + b"}",
    "not UTF-8": b'{"model": "unnamed", "prompt": "\xff"}',
    "UTF-16": '{"model": "unnamed", "prompt": "a"}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"model": "unnamed", "prompt": "a"}',
    "gzip": b"\x1f\x8b\x08\x00",
    "control character": b'{"model": "unnamed", "prompt": "a\x00"}',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_body_that_is_no_request(web, body):
    answer = web.send("POST", "/v1/completions", body)
    assert answer.status == 400
    assert answer.error["message"].startswith(("body: ", "body = ", "temperature = inf"))


def test_nesting_that_json_reads_but_nothing_else_does(web):
    for depth in range(850, 1000, 7):  # around the interpreter's limit
        deep = b"[" * depth + b"]" * depth
        for name in (b"prompt", b"stop", b"logit_bias", b"unknown", b"model"):
            body = b'{"model": "unnamed", "prompt": "a", "' + name + b'": ' + deep + b"}"
            answer = web.send("POST", "/v1/completions", body)
            assert answer.status == (200 if name == b"unknown" and answer.status == 200 else 400)


class TestBodies:
    """Large, slow and broken ones; the limit is `web`'s: 1 MiB, 1 s."""

    def test_the_limit(self, web):
        spare = (1 << 20) - len(json.dumps({"model": NAME, "prompt": "abc", "user": ""}))
        assert web.complete(user="u" * spare).status == 200
        answer = web.complete(user="u" * (spare + 1))
        assert answer.status == 413 and "1048576 bytes" in answer.error["message"]

    def test_without_a_content_length(self, web):
        def chunks(count):
            yield from [b" " * 65536] * count

        assert web.send("POST", "/v1/completions", chunks(32)).status == 413  # chunked
        small = web.send("POST", "/v1/completions", chunks(2))
        assert small.status == 400 and "not JSON" in small.error["message"]

    def test_without_an_end(self, web):
        connection = web.raw(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            connection.sendall((b"10000\r\n" + b" " * 65536 + b"\r\n") * 1000)  # 64 MiB
        connection.close()

    def test_asked_for_before_it_is_sent(self, web):
        text = head(10**9).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")
        assert read_all(web.raw(text)).startswith(b"HTTP/1.1 413 ")

    @pytest.mark.parametrize("sent", [head(100), head(100) + b'{"model"'])
    def test_one_that_does_not_come(self, web, sent):
        got = read_all(web.raw(sent))
        assert got.startswith(b"HTTP/1.1 408 ") and b"within 1 s" in got

    @pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nA: b"])
    def test_a_head_that_does_not_come(self, web, sent):
        got = read_all(web.raw(sent))
        assert got == b"" if not sent else got.startswith(b"HTTP/1.1 408 ")

    @pytest.mark.parametrize(
        "sent",
        [
            b"nonsense\r\n\r\n",
            b"GET / HTTP/1.1\r\n\r\n",  # no Host
            b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 1_000_000,
            head(3).replace(b"3", b"-3"),
            head(3).replace(b"3", b"3\r\nContent-Length: 4"),
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        ],
    )
    def test_what_is_not_http(self, web, sent):
        try:
            got = read_all(web.raw(sent))
        except OSError:  # it did not read all of what was sent, and so the answer may be lost
            assert len(sent) > 65536
        else:
            assert got.startswith(b"HTTP/1.1 400 ") and b'"invalid_request_error"' in got
        assert web.get("/health").status == 200
