"""Requests that ask for much: what is refused before work begins, and what is still answered.

The tiny model's sequences have 64 tokens; a text of a prompt may have 64 bytes for each.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engram_jax.serve.http.bounds import check_answer_size, check_body, listed_numbers
from engram_jax.serve.http.completion_request import parse_request
from engram_jax.serve.http.encode import PIECE, gathered, pieces
from engram_jax.serve.http.json_fields import ApiError, Fields
from engram_jax.serve.http.responses import Limits
from tests.properties import examples
from tests.serve.served import SERVE, make_engine
from tests.serve.web import EOS, QUEUE, Running, read_all, tokenizer

CAPACITY = SERVE.capacity
MOST = 64 * CAPACITY
BYTES = f"must have at most {MOST}, 64 for each of the {CAPACITY} tokens"
LONG = "context_length_exceeded"

PROMPTS = {
    # prompt, words of the message
    "a text of a megabyte": ("a" * 1_000_000, "has 1000000 bytes"),
    "a byte too long": ("a" * (MOST + 1), f"has {MOST + 1} bytes; {BYTES}"),
    "as long as may be": ("a" * MOST, f"has {MOST} tokens; must be from 1 to {CAPACITY - 1}"),
    "more bytes than characters": ("€" * (MOST // 3 + 1), f"has {MOST // 3 * 3 + 3} bytes"),
    "emoji": ("\U0001f600" * (MOST // 4 + 1), "bytes; must"),
    "NULs": ("\0" * (MOST + 1), "bytes; must"),
    "spaces": (" " * (MOST + 1), "bytes; must"),
    "lone surrogates": ("\ud800" * (MOST + 1), "bytes; must"),
    "the last of several texts": (["a", "b", "c" * (MOST + 1)], "bytes; must"),
    "ids": ([1] * 100_000, f"has 100000 tokens; must be from 1 to {CAPACITY}"),
    "an id too many": ([1] * (CAPACITY + 1), f"has {CAPACITY + 1} tokens"),
    "as many as a sequence has": ([1] * CAPACITY, f"must be from 1 to {CAPACITY - 1}"),
    "the last of several lists": ([[1], [2], [1] * 5000], "has 5000 tokens"),
    "what are no ids": (["a"] + [1] * 5000, "at most"),
    "values of all kinds": ([1, *([None] * 5000)], "has 5001 tokens"),
    "lists in lists": ([[[1] * 5000]], "must be a text"),
}


@pytest.mark.parametrize(("prompt", "words"), PROMPTS.values(), ids=PROMPTS)
def test_prompts(web, beside, prompt, words):
    answer = web.complete(prompt)
    assert answer.status == 400 and words in answer.error["message"], answer.error["message"]
    assert answer.error["param"] == "prompt"
    assert len(answer.body) < 500


RAW = {
    # body, whether it is refused before its JSON is read
    "a text": (b'{"prompt": "%s"}', True),
    "no spaces": (b'{"n":1,"prompt":"%s","seed":1}', True),
    "many spaces": (b'{"prompt"\r\n :\t [ \n"%s", "b"]}', True),
    "escapes": (b'{"prompt": "%s\\"\\\\"}', True),
    "the end is missing": (b'{"prompt": "%s', False),
    "in the second text": (b'{"prompt": ["b", "%s"]}', False),
    "another field": (b'{"prompt": "b", "user": "%s"}', False),
    "as if it were the key": (b'{"user": "\\"prompt\\": \\"%s", "prompt": "b"}', False),
    "a key that ends as it does": (b'{"\\"prompt": "%s", "prompt": "b"}', False),
    "a text with the key": (b'{"user": "\\"prompt", "prompt": "b", "x": "%s"}', False),
    "a number": (b'{"prompt": %s}', False),
}


@pytest.mark.parametrize(("body", "refused"), RAW.values(), ids=RAW)
def test_before_the_json_is_read(body, refused):
    """Where it cannot tell, what reads the JSON does."""
    for size, too_long in ((MOST, False), (MOST + 20, True)):
        sent = body % (b"1" * size)
        if refused and too_long:
            with pytest.raises(ApiError, match="must have at most") as error:
                check_body(sent, CAPACITY)
            assert error.value.body["error"]["code"] == LONG
        else:
            check_body(sent, CAPACITY)


@examples(200)
@given(st.text(max_size=6).map(lambda text: 100 * text), st.booleans(), st.booleans())
@example("\x01" * 200, True, False)  # all escapes: six bytes for one
def test_never_more_than_the_json_has(text, ascii_only, nested):
    """No prompt that the limit allows is refused, however it is escaped."""
    body = json.dumps({"user": text, "prompt": [text] if nested else text}, ensure_ascii=ascii_only)
    body = body.encode("utf-8", "surrogatepass")
    size = len(text.encode("utf-8", "replace"))
    check_body(body, -(-size // 64))


@pytest.fixture(scope="module")
def small():
    """An answer may list 200 tokens and log-probabilities."""
    engine = make_engine(tokenizer=tokenizer(), eos_id=EOS, queue=QUEUE)
    with Running(engine, Limits(seconds=5, sequences=QUEUE, answer=200)) as running:
        yield running
    engine.close()


ANSWERS = {
    # fields, how many it could list
    "tokens": ({"max_tokens": 10, "n": 20}, 200),
    "a choice more": ({"max_tokens": 10, "n": 21}, 210),
    "several prompts": ({"prompt": ["a", "b", "c"], "max_tokens": 10, "n": 7}, 210),
    "log-probabilities": ({"max_tokens": 10, "n": 10, "logprobs": 0}, 200),
    "of 20 alternatives": ({"max_tokens": 9, "logprobs": 20}, 198),
    "and one token more": ({"max_tokens": 10, "logprobs": 20}, 220),
    "with the prompt": ({"prompt": "a" * 4, "echo": True, "max_tokens": 5, "logprobs": 20}, 198),
    "with a longer one": ({"prompt": "a" * 5, "echo": True, "max_tokens": 5, "logprobs": 20}, 220),
    "only the prompt": ({"prompt": "a" * 10, "echo": True, "max_tokens": 0, "logprobs": 18}, 200),
    "prompts of all lengths": (
        {"prompt": ["a" * 4, "b", "c" * 5], "echo": True, "max_tokens": 0, "logprobs": 18},
        200,
    ),
    "the prompt for every choice": (
        {"prompt": "a" * 50, "echo": True, "n": 4, "max_tokens": 1},
        204,
    ),
    "the default of max_tokens": ({"n": 8, "logprobs": 0}, 256),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "numbers"), ANSWERS.values(), ids=ANSWERS)
def test_answers(small, fields, numbers, stream):
    answer = small.complete(**fields, stream=stream, ignore_eos=True)
    if numbers > 200:
        assert answer.status == 400 and answer.error["code"] == "answer_too_large"
        assert f"could list {numbers} tokens" in answer.error["message"]
        assert "must be at most 200 (config.serve.max_answer)" in answer.error["message"]
        return
    assert answer.status == 200
    choices = [e["choices"][0] for e in answer.events] if stream else answer.json["choices"]
    listed = [c["logprobs"] for c in choices if c["logprobs"]]
    if "logprobs" in fields:
        tokens = sum(len(one["tokens"]) for one in listed)
        assert tokens * (fields["logprobs"] + 2) == numbers
    elif not stream:
        assert answer.json["usage"]["completion_tokens"] == numbers


def test_large_answers_together():
    """One at a time fits; small ones always do."""
    engine = make_engine(tokenizer=tokenizer(), eos_id=EOS, queue=QUEUE)
    large = {"prompt": "a" * 40, "echo": True, "logprobs": 20, "n": 5, "max_tokens": 20}
    numbers = 5 * 60 * 22
    with Running(engine, Limits(seconds=5, sequences=QUEUE, answers=numbers)) as web:
        first = web.begin(**large, stream=True, ignore_eos=True)
        assert first.recv(12) == b"HTTP/1.1 200"
        second = web.complete(**large)
        assert second.status == 429 and second.error["code"] == "queue_full"
        assert f"and this one could list {numbers}: must be at most" in second.error["message"]
        assert web.complete(logprobs=20, max_tokens=2).status == 200
        assert read_all(first).count(b'"finish_reason":"length"') == 5
        assert web.complete(**large).status == 200
    engine.close()


def test_the_bound_is_the_last_that_is_allowed():
    """3 prompts of 5, 2 and 1 tokens, 4 more each, echoed, and 1 + 1 numbers beside each token."""
    fields = {"prompt": [[1] * 5, [1, 1], [1]], "max_tokens": 4, "echo": True, "logprobs": 0}
    request = parse_request(Fields(fields), tokenizer=None, capacity=64, most=8)
    numbers = (9 + 6 + 5) * 2
    assert check_answer_size(request, numbers) == numbers
    with pytest.raises(ApiError, match=f"could list {numbers} .* at most {numbers - 1} "):
        check_answer_size(request, numbers - 1)


def test_an_answer_of_144_megabytes():
    """1,000 ids, 250 choices, 20 alternatives, the prompt echoed."""
    fields = {"prompt": [1] * 1000, "n": 250, "echo": True, "logprobs": 20, "max_tokens": 20}
    request = parse_request(Fields(fields), tokenizer=None, capacity=4096, most=256)
    assert listed_numbers(request) == 250 * 1020 * 22
    with pytest.raises(ApiError) as error:
        check_answer_size(request, Limits().answer)
    assert error.value.status == 400
    assert "250 choices x tokens of prompt and answer x logprobs + 2 = 22" in error.value.message


VALUES = [
    *(0, -1.5, True, None, "", "ä\n\"'\u2028", [], {}, [[]], [{}], {"a": {}}, {"": []}),
    list(range(1000)),
    [None, *({"a": 0.25, "b": -1e-9} for _ in range(200))],
    [{"a": [1, 2], "b": {"c": []}}, {"a": []}],
    {"choices": [{"text": "x" * 100_000, "logprobs": {"tokens": ["a"] * 500, "top": []}}]},
]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_pieces_are_the_values_json(value):
    whole = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    assert b"".join(pieces(value)) == whole
    for size in (1, 7, PIECE):
        got = list(gathered(pieces(value), size))
        assert b"".join(got) == whole and all(len(part) >= size for part in got[:-1])


def test_pieces_are_made_when_their_turn_comes():
    made = []

    def choices():
        for i in range(3):
            made.append(i)
            yield {"index": i, "tokens": [1] * 100}

    parts = pieces({"choices": choices(), "usage": lambda: list(made), "none": iter(())})
    got = b""
    while made != [0, 1]:
        got += next(parts)
    assert got.count(b"index") == 1 or b'"index":1' not in got
    got += b"".join(parts)
    found = json.loads(got)
    assert found["usage"] == [0, 1, 2] and found["none"] == []
    assert [c["index"] for c in found["choices"]] == [0, 1, 2]


def test_a_part_is_small_whatever_the_answer():
    """What holds Python's lock at once: some dozens of numbers, and nothing of a list's length."""
    top = {f"token {i}": -0.123456789 for i in range(21)}
    made = ({**top} if i else None for i in range(1000))
    value = {"logprobs": {"tokens": ["a"] * 10_000, "top_logprobs": [top] * 1000, "made": made}}
    assert max(map(len, pieces(value))) < 4 * len(json.dumps(top))


def test_who_encodes_rests(monkeypatch):
    """A rest for every half millisecond of work, as many times as long as asked; and what passes
    between two pieces is not work."""
    now, rests = [0.0], []

    def sleep(seconds):
        rests.append((now[0], seconds))
        now[0] += seconds

    def parts():
        for _ in range(40):
            now[0] += 0.0002
            yield b"x" * 10

    monkeypatch.setattr("engram_jax.serve.http.encode.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("engram_jax.serve.http.encode.time.sleep", sleep)
    found = gathered(parts(), size=150, rest=3.0)
    lengths = []
    for piece in found:
        lengths.append(len(piece))
        now[0] += 1.0  # it is sent
    assert lengths == [150, 150, 100]
    assert [seconds for _, seconds in rests] == pytest.approx([3 * 0.0006] * 13)
    assert b"".join(gathered(parts(), size=150)) == b"x" * 400 and len(rests) == 13
