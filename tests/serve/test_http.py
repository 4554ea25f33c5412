"""OpenAI's completions route over real sockets, with the real engine behind it."""

from __future__ import annotations

import concurrent.futures
import json
import random
import socket

import pytest

from engram_jax.config.errors import UserError
from engram_jax.serve.http import server
from engram_jax.serve.http.responses import Limits
from tests.serve.served import SERVE, full_logits, make_engine
from tests.serve.web import CASES, EOS, NAME, QUEUE, Running, head, tokenizer
from tests.tiny import VOCAB

LONG = {"n": QUEUE, "max_tokens": 60, "ignore_eos": True}  # seconds of work


def test_an_answer_is_the_engines(web, alone):
    for (prompt, fields), expected in zip(CASES, alone, strict=True):
        answer = web.complete(prompt, **fields, return_token_ids=True)
        assert answer.status == 200 and answer.headers["content-type"] == "application/json"
        got = answer.json
        assert sorted(got) == ["choices", "created", "id", "model", "object", "usage"]
        assert got["object"] == "text_completion" and got["model"] == NAME
        ids = web.engine.tokenizer.encode(prompt).ids
        assert got["choices"] == [
            {
                "text": expected.text,
                "index": 0,
                "logprobs": None,
                "finish_reason": expected.finish,
                "token_ids": list(expected.tokens),
                "prompt_token_ids": ids,
            }
        ]
        n, m = len(ids), expected.sampled  # one more than the listed ones where <eos> was drawn
        usage = {"prompt_tokens": n, "completion_tokens": m, "total_tokens": n + m}
        assert got["usage"] == usage
        given_as_ids = web.complete(ids, **fields).json["choices"][0]["text"]
        assert given_as_ids == expected.text


def test_a_stream_is_the_same_in_parts(web, alone):
    for (prompt, fields), expected in zip(CASES, alone, strict=True):
        options = {"include_usage": True}
        answer = web.complete(prompt, **fields, stream=True, stream_options=options, logprobs=3)
        *events, last = answer.events
        assert len(events) > 1 or len(expected.tokens) < 2
        choices = [event["choices"][0] for event in events]
        assert "".join(c["text"] for c in choices) == expected.text
        assert [c["finish_reason"] for c in choices] == [None] * (len(events) - 1) + [
            expected.finish
        ]
        assert all(event["usage"] is None and event["id"] == last["id"] for event in events)
        whole = web.complete(prompt, **fields, logprobs=3).json
        assert last["choices"] == [] and last["usage"] == whole["usage"]
        listed = whole["choices"][0]["logprobs"]
        for key, values in listed.items():
            assert [v for c in choices for v in c["logprobs"][key]] == values


def test_log_probabilities_and_echo(web, alone):
    texts = {i: t for t, i in web.engine.tokenizer.get_vocab().items()}
    for (prompt, fields), expected in zip(CASES, alone, strict=True):
        answer = web.complete(prompt, **fields, logprobs=3, echo=True).json["choices"][0]
        assert answer["text"] == prompt + expected.text
        listed = answer["logprobs"]
        ids = [*web.engine.tokenizer.encode(prompt).ids, *expected.tokens]
        entries = [*expected.prompt_logprobs, *expected.logprobs]
        assert listed["token_logprobs"] == [None, *(e.logprob for e in entries)]
        assert listed["top_logprobs"][0] is None
        for token, top, entry in zip(ids[1:], listed["top_logprobs"][1:], entries, strict=True):
            assert entry.token == token
            assert max(top.values()) == max(entry.top.values())
            assert len(top) == 3 + (token not in entry.top)  # the token itself is always there
        for token, text in zip(ids, listed["tokens"], strict=True):
            plain = text.removeprefix("bytes:")
            assert plain in (texts[token].replace("Ġ", " "), text) or plain.startswith("\\x")
        offsets = listed["text_offset"]
        assert offsets[0] == 0 and offsets == sorted(offsets)
        for at, text in zip(offsets, listed["tokens"], strict=True):
            if not text.startswith("bytes:") and text != "<eos>":
                assert answer["text"][at : at + len(text)] == text
        only = web.complete(prompt, max_tokens=0, logprobs=3, echo=True).json
        n = len(web.engine.tokenizer.encode(prompt).ids)
        assert only["usage"]["completion_tokens"] == 0
        assert only["choices"][0]["logprobs"] == {k: v[:n] for k, v in listed.items()}
        plain = web.complete(prompt, **fields, logprobs=0).json["choices"][0]
        assert plain["text"] == expected.text
        assert all(len(top) == 1 for top in plain["logprobs"]["top_logprobs"])


def test_special_tokens_in_an_answer_have_no_text(web):
    """Drawn in the middle of an answer, also between the bytes of a character."""
    ends = 0
    for seed in range(12):
        fields = {"max_tokens": 50, "temperature": 1.5, "seed": seed, "logprobs": 0}
        choice = web.complete("x = 1", ignore_eos=True, **fields).json["choices"][0]
        text, listed = choice["text"], choice["logprobs"]
        places = list(zip(listed["tokens"], listed["text_offset"], strict=True))
        assert "<eos>" not in text and [at for _, at in places] == sorted(at for _, at in places)
        plain = [(token, at) for token, at in places if not token.startswith("bytes:")]
        assert all(text[at : at + len(t)] == t for t, at in plain if t != "<eos>")
        ends += sum(token == "<eos>" for token, _ in places[:-1])
    assert ends > 3


def test_scoring_as_lm_eval_does_it(web):
    """One further token is listed always, also where it ends the sequence."""
    rng, ends = random.Random(0), 0
    for tried in range(1000):  # few prompts are ended at once
        if tried >= 80 and ends:
            break
        ids = [rng.randrange(VOCAB) for _ in range(rng.randint(2, 30))]
        answer = web.complete(ids, max_tokens=1, temperature=0, logprobs=1, echo=True).json
        choice = answer["choices"][0]
        assert len(choice["logprobs"]["token_logprobs"]) == len(ids) + 1
        likeliest = full_logits(ids)[-1].argmax() == EOS
        assert (choice["logprobs"]["tokens"][-1] == "<eos>") == likeliest
        assert choice["finish_reason"] == ("stop" if likeliest else "length")
        ends += likeliest
        if likeliest and ends < 3:  # the same in parts
            again = web.complete(ids, max_tokens=1, temperature=0, logprobs=1, stream=True)
            assert again.events[-1]["choices"][0]["finish_reason"] == "stop"
    assert ends


def test_several_prompts_and_choices(web):
    prompts = ["abc", "xyz", "abc"]
    answer = web.complete(prompts, n=2, seed=5, max_tokens=9, best_of=2, temperature=1.5)
    texts = [c["text"] for c in answer.json["choices"]]
    assert [c["index"] for c in answer.json["choices"]] == list(range(6))
    assert texts[:2] == texts[4:] and texts[0] != texts[1]
    for seed, same in ((5, texts[2]), (6, None)):  # the next seed repeats none of the choices
        one = web.complete("xyz", seed=seed, max_tokens=9, temperature=1.5).json["choices"][0]
        assert one["text"] == same if same else one["text"] not in texts[2:4]
    ids = [web.engine.tokenizer.encode(p).ids for p in prompts]
    again = web.complete(ids, n=2, seed=5, max_tokens=9, temperature=1.5, stream=True)
    streamed = [""] * 6
    for event in again.events:
        streamed[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert streamed == texts
    unseeded = {web.complete("abc", max_tokens=12).json["choices"][0]["text"] for _ in range(4)}
    assert len(unseeded) > 1


def test_stops(web):
    fields = {"seed": 3, "max_tokens": 40, "ignore_eos": True}
    whole = web.complete("ab", **fields).json["choices"][0]["text"]
    stop = whole[8:10]
    for given in (stop, [stop], ["\u2603", stop]):
        choice = web.complete("ab", stop=given, **fields).json["choices"][0]
        assert choice["text"] == whole[: whole.index(stop)]
        assert choice["finish_reason"] == "stop"
    events = web.complete("ab", stop=stop, stream=True, **fields).events
    assert "".join(e["choices"][0]["text"] for e in events) == whole[: whole.index(stop)]
    ids = web.complete("ab", return_token_ids=True, **fields).json["choices"][0]["token_ids"]
    choice = web.complete("ab", stop_token_ids=[ids[5]], return_token_ids=True, **fields).json
    assert choice["choices"][0]["token_ids"] == ids[: ids.index(ids[5])]


def test_concurrent_clients(web, alone):
    def ask(i: int) -> tuple[int, str]:
        prompt, fields = CASES[i % len(CASES)]
        answer = web.complete(prompt, **fields, stream=i % 3 == 0)
        if i % 3 == 0:
            return i, "".join(e["choices"][0]["text"] for e in answer.events)
        return i, answer.json["choices"][0]["text"]

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        for i, text in pool.map(ask, range(96)):
            assert text == alone[i % len(CASES)].text


def test_fields_that_change_nothing(web):
    expected = web.complete(seed=1, max_tokens=8).json["choices"]
    for fields in (
        {"user": "me", "suffix": None, "logit_bias": {}, "presence_penalty": 0.0, "stop": None},
        {"frequency_penalty": 0, "best_of": 1, "top_k": -1, "top_p": 1, "logprobs": None, "n": 1},
        {"temperature": 1, "echo": False, "stop": [], "stream": False, "stream_options": None},
        {"top_k": None, "min_p": 0, "repetition_penalty": 1.0, "min_tokens": 0, "bad_words": []},
        {"metadata": {"a": "b"}, "store": True, "service_tier": "auto", "add_special_tokens": True},
        {"max_completion_tokens": 8, "skip_special_tokens": True, "response_format": None},
    ):
        assert web.complete(**{"seed": 1, "max_tokens": 8, **fields}).json["choices"] == expected


def test_routes(web):
    models = web.get("/v1/models").json
    assert models["object"] == "list" and [m["id"] for m in models["data"]] == [NAME]
    assert web.get(f"/v1/models/{NAME}").json == models["data"][0]
    assert models["data"][0]["max_model_len"] == SERVE.capacity
    for answer in (
        web.get("/v1/models/other"),
        web.send("POST", "/v1/completions", json.dumps({"model": "ot\ud800her", "prompt": "a"})),
    ):
        assert answer.status == 404 and answer.error["code"] == "model_not_found"
        assert NAME in answer.error["message"]
    assert web.get("/health").json == {"status": "ok"}
    for path in ("/", "/v1", "/v1/completions/", "/v1/embeddings", "/%ff%00", "/" + "x" * 5000):
        answer = web.get(path)
        assert answer.status == 404 and "no such route" in answer.json["error"]["message"]
    chat = web.send("POST", "/v1/chat/completions", "{}")
    assert chat.status == 404 and "chat template" in chat.error["message"]
    for method, path, allowed in [
        ("GET", "/v1/completions", "POST"),
        ("DELETE", "/v1/models", "GET"),
        ("POST", "/health", "GET"),
    ]:
        answer = web.send(method, path)
        assert answer.status == 405 and allowed in answer.headers["allow"]
        assert "must be" in answer.error["message"]


def test_metrics(web):
    before = web.idle()
    assert web.complete(max_tokens=7, ignore_eos=True).status == 200
    assert web.complete(max_tokens=-7).status == 400
    after = web.idle()
    assert after["engram_generated_tokens"] - before["engram_generated_tokens"] == 7
    assert after["engram_prompt_tokens"] - before["engram_prompt_tokens"] == 3
    name = 'engram_http_responses_total{status="400"}'
    assert after[name] - before.get(name, 0) == 1
    assert after["engram_free_pages"] == after["engram_pages"]


class TestDisconnects:
    @pytest.mark.parametrize("stream", [False, True])
    def test_cancels(self, web, stream):
        web.idle()
        connection = web.begin(**LONG, stream=stream)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        else:
            while not web.stats()["engram_waiting"]:
                pass
        before = web.stats()["engram_generated_tokens"]
        connection.close()
        after = web.idle()
        assert after["engram_generated_tokens"] - before < QUEUE * 60 / 2
        assert after["engram_free_pages"] == after["engram_pages"]

    def test_before_the_body(self, web):
        web.raw(head(100) + b"{").close()
        connection = web.raw(head(100) + b"{")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()  # with a reset
        assert web.complete().status == 200


def test_a_full_queue(web):
    """All sequences of a request get in, or none of them."""
    web.idle()
    connection = web.begin(**LONG)
    while not web.stats()["engram_waiting"]:
        pass
    before = web.stats()["engram_waiting"]
    answer = web.complete(n=40, max_tokens=1)
    assert answer.status == 429 and int(answer.headers["retry-after"]) >= 1
    assert answer.error["type"] == "rate_limit_error" and answer.error["code"] == "queue_full"
    assert web.stats()["engram_waiting"] <= before
    connection.close()
    web.idle()
    assert web.complete(n=40, max_tokens=1).status == 200


def test_more_requests_than_are_answered_at_once():
    """A fresh server: two may be under way. One counts when its body has arrived."""
    limits = Limits(requests=2, seconds=30, sequences=QUEUE)
    with Running(make_engine(), limits) as web:
        slow = [web.raw(head(10)) for _ in range(5)]
        slow += [web.raw(head(10) + b" ") for _ in range(5)]
        assert web.complete([1]).status == 200
        long = [web.begin([1], **LONG) for _ in range(2)]
        while (answer := web.complete([1])).status != 429:
            pass
        assert "2 requests are being answered" in answer.error["message"]
        for connection in long:
            connection.close()
        while web.complete([1]).status != 200:  # it is noticed that they have gone
            pass
        for connection in slow[:3]:
            connection.sendall(b" " * 10)
            assert connection.recv(100).startswith(b"HTTP/1.1 400")
        for connection in slow:
            connection.close()


def test_without_a_tokenizer():
    with Running(make_engine()) as web:
        choice = web.complete([1, 2], max_tokens=3, logprobs=1, return_token_ids=True)
        choice = choice.json["choices"][0]
        assert choice["text"] == "" and len(choice["token_ids"]) == 3
        assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]
        assert "no tokenizer" in web.complete("a").error["message"]
        assert "no tokenizer" in web.complete([1], stop="a").error["message"]


def test_an_engine_that_fails(caplog):
    """Those who wait are told, and so is whoever looks at its health."""
    made = make_engine(tokenizer=tokenizer())
    with Running(made) as web:
        stream = web.begin(max_tokens=60, n=30, stream=True)
        assert b"200" in stream.recv(20)
        made._steps = None  # what a lost device does: every further step raises
        assert b'data: {"error":' in read_or_close(stream)
        assert web.get("/health").status == 503
        answer = web.complete()
        assert answer.status == 503 and answer.error["type"] == "server_error"
    failures = [r for r in caplog.records if r.exc_info]
    assert len(failures) == 1 and "NoneType" in str(failures[0].exc_info[1])


def read_or_close(connection: socket.socket) -> bytes:
    got = b""
    while b"[DONE]" not in got:
        got += connection.recv(65536)
    connection.close()
    return got


def test_ports():
    first = server.bind("127.0.0.1", 0)
    first.listen()
    port = first.getsockname()[1]
    with pytest.raises(UserError, match=f"port {port} on 127.0.0.1: is in use"):
        server.bind("127.0.0.1", port)
    first.close()
    server.bind("127.0.0.1", port).close()
    for host, wrong in [("127.0.0.1", 65536), ("127.0.0.1", -1), ("no.such.host.invalid", 80)]:
        with pytest.raises(UserError, match="port"):
            server.bind(host, wrong)
