"""Fields of a request, one line a case: what is sent, what is answered; beside each, a neighbour's
stream, which must come whole."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest

from engram_jax.serve.http.completion_fields import CHAT, UNSUPPORTED
from tests.serve.served import SERVE
from tests.serve.web import EOS, NAME, Running, read_until, tokenizer
from tests.tiny import VOCAB

D, E = 3, 4  # the ids of "d" and "e"
NEIGHBOUR = {"prompt": "the", "stream": True, "seed": 3, "max_tokens": 7, "ignore_eos": True}
BASE = {"max_tokens": 8, "seed": 1, "return_token_ids": True}
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def server(web_engine):
    with Running(web_engine) as running:
        running.neighbour = stream_of(running.begin(**NEIGHBOUR))
        assert len(running.neighbour) > 3
        running.plain = running.complete(**BASE).json["choices"]
        yield running


def stream_of(connection):
    """The text of a stream, to its end."""
    got = read_until(connection, b"0\r\n\r\n")
    connection.close()
    *events, last = re.findall(rb"data: (.+)\n\n", got)
    assert last == b"[DONE]"
    events = [json.loads(event) for event in events]
    assert all("error" not in event for event in events)
    return "".join(event["choices"][0]["text"] for event in events)


def beside_a_neighbour(server, send):
    """The answer to `send()`, while another client's stream runs."""
    connection = server.begin(**NEIGHBOUR)
    answer = send()
    assert stream_of(connection) == server.neighbour
    return answer


# Refused: fields, words of the message, the parameter named ("" = the first field; None = none).

TYPES = [
    ({"max_completion_tokens": 0}, "from 1 to", ""),
    ({"max_completion_tokens": "5"}, "= '5': must be a whole number", ""),
    ({"max_completion_tokens": 62}, "must be from 1 to 61", ""),
    ({"max_completion_tokens": 4, "max_tokens": 5}, "the same as max_tokens = 5", ""),
    ({"presence_penalty": 2.5}, "from -2 to 2", ""),
    ({"presence_penalty": "high"}, "= 'high'", ""),
    ({"presence_penalty": True}, "= true", ""),
    ({"frequency_penalty": -3}, "from -2 to 2", ""),
    ({"frequency_penalty": [0.5]}, "a list of 1", ""),
    ({"frequency_penalty": 10**400}, "a number from -2 to 2", ""),
    ({"repetition_penalty": 0}, "from 0.001 to 1000", ""),
    ({"repetition_penalty": -1.5}, "from 0.001 to 1000", ""),
    ({"repetition_penalty": {}}, "an object", ""),
    ({"min_p": 1.5}, "from 0 to 1", ""),
    ({"min_p": -0.1}, "from 0 to 1", ""),
    ({"min_p": "0.1"}, "a number", ""),
    ({"min_tokens": 17, "max_tokens": 16}, "from 0 to 16", ""),
    ({"min_tokens": -1}, "a whole number from 0", ""),
    ({"min_tokens": 1.5}, "a whole number", ""),
    ({"logit_bias": [3]}, "an object of at most 1000 token ids", ""),
    ({"logit_bias": {"a": 1}}, "'a': 1: must be a token id", ""),
    ({"logit_bias": {"-3": 1}}, "must be a token id", ""),
    ({"logit_bias": {"+3": 1}}, "must be a token id", ""),
    ({"logit_bias": {"03": 1}}, "must be a token id", ""),
    ({"logit_bias": {"٣": 1}}, "must be a token id", ""),
    ({"logit_bias": {"3": 101}}, "from -100 to 100", ""),
    ({"logit_bias": {"3": "1"}}, "'1': must be", ""),
    ({"logit_bias": {"3": None}}, "null: must be", ""),
    ({"logit_bias": {str(i): 1 for i in range(1001)}}, "at most 1000 token ids", ""),
    ({"logit_bias": {str(VOCAB): 1}}, f"token id {VOCAB}: must be from 0 to {VOCAB - 1}", None),
    ({"allowed_token_ids": []}, "1 to 1000 token ids", ""),
    ({"allowed_token_ids": 3}, "a list of", ""),
    ({"allowed_token_ids": [-1]}, "token ids", ""),
    ({"allowed_token_ids": ["3"]}, "token ids", ""),
    ({"allowed_token_ids": [3] * 1001}, "at most 1000", ""),
    ({"allowed_token_ids": [VOCAB]}, f"token id {VOCAB}", None),
    ({"allowed_token_ids": [EOS], "min_tokens": 1}, "must have a token that bad_words", None),
    ({"allowed_token_ids": [D], "bad_words": ["d"]}, "must have a token that bad_words", None),
    ({"allowed_token_ids": [D, E], "stop_token_ids": [D, E], "min_tokens": 2},
     "have a token", None),
    ({"bad_words": [3]}, "a text or a list", ""),
    ({"bad_words": [""]}, "texts of 1 to 1000 characters", ""),
    ({"bad_words": ["a"] * 17}, "at most 16", ""),
    ({"bad_words": ["x" * 1001]}, "1 to 1000 characters", ""),
    ({"bad_words": ["\ud800"]}, "surrogate", ""),
    ({"bad_words": ["\U0001f600"]}, r"texts that the tokenizer has; '\U0001f600' is not one", ""),
    ({"bad_words": ["a", "b\U0001f600"]}, "texts that the tokenizer has", ""),  # would ban "b"
    ({"bad_words": "\u2603"}, "texts that the tokenizer has", ""),  # it has one byte of three
    ({"stop_token_ids": [VOCAB]}, f"stop_token_ids: token id {VOCAB}", None),
    ({"include_stop_str_in_output": 1}, "true or false", ""),
    ({"skip_special_tokens": "no"}, "true or false", ""),
    ({"truncate_prompt_tokens": 0}, "-1 or at least 1", ""),
    ({"truncate_prompt_tokens": -2}, "from -1", ""),
    ({"truncate_prompt_tokens": 2.0}, "a whole number", ""),
    ({"truncation_side": "left"}, "used with truncate_prompt_tokens", ""),
    ({"truncation_side": "middle", "truncate_prompt_tokens": 2}, "'left' or 'right'", ""),
    ({"truncation_side": 1, "truncate_prompt_tokens": 2}, "'left' or 'right'", ""),
    ({"truncate_prompt_tokens": 63, "prompt": "a" * 70, "max_tokens": 2},
     "63 of them", "max_tokens"),
    ({"prompt_logprobs": 21}, "from 0 to 20", ""),
    ({"prompt_logprobs": -1}, "from 0 to 20", ""),
    ({"prompt_logprobs": True}, "from 0 to 20", ""),
    ({"prompt_logprobs": 2, "stream": True}, "used without stream", ""),
    ({"return_tokens_as_token_ids": "yes"}, "true or false", ""),
    ({"request_id": ""}, "1 to 128 letters", ""),
    ({"request_id": "a b"}, "1 to 128 letters", ""),
    ({"request_id": "a\r\nSet-Cookie: b"}, "1 to 128 letters", ""),
    ({"request_id": 7}, "1 to 128 letters", ""),
    ({"request_id": "a" * 129}, "1 to 128 letters", ""),
    ({"metadata": "a"}, "an object; it has no effect", ""),
    ({"store": "yes"}, "true or false; it has no effect", ""),
    ({"user": ["me"]}, "a text; it has no effect", ""),
    ({"service_tier": 1}, "a text; it has no effect", ""),
    ({"add_special_tokens": 1}, "true or false", ""),
    ({"stream": True, "stream_options": {"continuous_usage_stats": 1}}, "true or false",
     "stream_options.continuous_usage_stats"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "not supported",
     "stream_options.include_obfuscation"),
    ({"stream": True, "stream_options": {"include_usge": True}},
     "did you mean stream_options.include_usage?", "stream_options.include_usge"),
]  # fmt: skip

UNKNOWN = [
    ({"temperture": 1}, "did you mean temperature?", ""),
    ({"Temperature": 1}, "did you mean temperature?", ""),
    ({"max_token": 1}, "did you mean max_tokens?", ""),
    ({"maxTokens": 1}, "did you mean max_tokens?", ""),
    ({"topk": 1}, "did you mean top_k?", ""),
    ({"top-p": 1}, "did you mean top_p?", ""),
    ({"minp": 1}, "did you mean min_p?", ""),
    ({"stops": ["a"]}, "did you mean stop?", ""),
    ({"logprob": 1}, "did you mean logprobs?", ""),
    ({"frequency_penality": 1}, "did you mean frequency_penalty?", ""),
    ({"bad_word": "a"}, "did you mean bad_words?", ""),
    ({"ignore_eos_token": True}, "did you mean ignore_eos?", ""),
    ({"best_off": 1}, "did you mean best_of?", ""),
    ({"steam": True}, "did you mean stream?", ""),
    ({"prompts": "a"}, "did you mean prompt?", ""),
    ({"stop_token_id": [1]}, "did you mean stop_token_ids?", ""),
    ({"top_logprobs": 3}, "did you mean logprobs?", ""),
    ({"max_new_tokens": 3}, "did you mean max_tokens?", ""),
    ({"max_length": 3}, "did you mean max_tokens?", ""),
    ({"n_predict": 3}, "did you mean max_tokens?", ""),
    ({"repeat_penalty": 1.1}, "did you mean repetition_penalty?", ""),
    ({"stop_sequences": ["a"]}, "did you mean stop?", ""),
    ({"inputs": "a"}, "did you mean prompt?", ""),
    ({"random_seed": 1}, "did you mean seed?", ""),
    ({"never_heard_of": None}, "is no known field; docs/serving.md lists", ""),
    ({"": 1}, "'': is no known field", ""),
    ({"x" * 100_000: 1}, "xxx...: is no known field", None),
    ({"\n\x00<b>": 1}, r"\n\x00<b>: is no known field", r"\n\x00<b>"),
    ({"\ud800": 1}, r"\ud800: is no known field", r"\ud800"),
    ({"__class__": 1}, "is no known field", ""),
]

ANY = {  # values other than the ones that change nothing
    "suffix": "end", "response_format": {"type": "json_object"}, "use_beam_search": True,
    "length_penalty": 0.5, "early_stopping": True, "priority": 1, "stream_interval": 4,
    "watermarking": True, "logits_processors": ["a"], "vllm_xargs": {"a": 1}, "do_sample": False,
    "num_beams": 4, "return_token_offsets": True,
}  # fmt: skip
REFUSED = [
    *TYPES,
    *UNKNOWN,
    *(({name: ANY.get(name, 0.25)}, f"{name} is not supported", "") for name in UNSUPPORTED),
    *(({name: [{"role": "user"}]}, "is a field of chat", "") for name in CHAT),
]


@pytest.mark.parametrize(("fields", "words", "param"), REFUSED)
def test_a_refused_field(server, fields, words, param):
    answer = beside_a_neighbour(server, lambda: server.complete(**fields))
    assert answer.status == 400 and answer.error["type"] == "invalid_request_error"
    assert words in answer.error["message"]
    if param is not None:
        assert answer.error["param"] == (param or next(iter(fields)))


# Served: fields; what holds of the choice `c`, its ids `i`, the whole answer `a`, another `ask`.

ONLY = {"allowed_token_ids": [D, E], **GREEDY}
SERVED = [
    ({"max_tokens": None, "max_completion_tokens": 3}, lambda r: len(r.i) == 3),
    ({"max_tokens": 3, "max_completion_tokens": 3}, lambda r: len(r.i) == 3),
    ({"allowed_token_ids": [D, E]}, lambda r: set(r.i) <= {D, E} and len(r.i) == 8),
    ({"allowed_token_ids": [D, D, D]}, lambda r: r.c["text"] == "d" * 8),
    ({"allowed_token_ids": [D], "logprobs": 0},
     lambda r: max(r.c["logprobs"]["token_logprobs"]) < -0.5),  # of the model, not 0
    ({"logit_bias": {"5": 100}}, lambda r: r.i == [5] * 8),
    ({"logit_bias": {"5": 100, "6": -100.0}}, lambda r: r.i == [5] * 8),
    ({**ONLY, "logit_bias": {str(D): -100}}, lambda r: r.i == [E] * 8),
    ({**ONLY, "logit_bias": {"5": 100}}, lambda r: 5 not in r.i),
    ({**ONLY, "bad_words": "d"}, lambda r: r.c["text"] == "e" * 8),
    ({**ONLY, "bad_words": ["dd", "ee"]}, lambda r: r.c["text"] in ("dededede", "edededed")),
    ({**ONLY, "bad_words": ["de", "ed"]}, lambda r: len(set(r.i)) == 1),
    ({"bad_words": [" ", "a"]}, lambda r: not set(" a") & set(r.c["text"])),
    ({"bad_words": ["é"], "allowed_token_ids": [53, 54]}, lambda r: "é" not in r.c["text"]),
    ({**ONLY, "frequency_penalty": 2}, lambda r: set(r.i) == {D, E}),
    ({**ONLY, "frequency_penalty": -2}, lambda r: len(set(r.i)) == 1),
    ({**ONLY, "presence_penalty": 2, "logit_bias": {str(D): 100}}, lambda r: r.i == [D] * 8),
    ({**ONLY, "repetition_penalty": 1000, "prompt": "ddd"}, lambda r: set(r.i) <= {D, E}),
    ({"repetition_penalty": 1.0000001}, lambda r: r.a["choices"] == r.plain),
    ({"min_p": 1}, lambda r: r.c["text"] == r.ask(**GREEDY)["text"]),
    ({"min_p": 1e-30}, lambda r: r.a["choices"] == r.plain),
    ({**GREEDY, "min_p": 0.5}, lambda r: r.c["text"] == r.ask(**GREEDY)["text"]),
    ({"min_p": 0.2, "top_k": 3, "top_p": 0.9}, lambda r: len(r.i) > 0),
    ({"allowed_token_ids": [EOS, D], "logit_bias": {str(EOS): 100}, "min_tokens": 5},
     lambda r: r.i == [D] * 5 and r.u == 6 and r.c["finish_reason"] == "stop"),
    ({"allowed_token_ids": [E, D], "logit_bias": {str(E): 100}, "stop_token_ids": [E],
      "min_tokens": 3}, lambda r: r.i == [D] * 3 and r.u == 4),
    ({"allowed_token_ids": [D], "stop": "d", "min_tokens": 4},
     lambda r: r.c["text"] == "dddd" and r.i == [D] * 4 and r.u == 5),
    ({"allowed_token_ids": [D], "stop": "d"},
     lambda r: (r.c["text"], r.i, r.u, r.c["finish_reason"]) == ("", [], 1, "stop")),
    ({"allowed_token_ids": [D], "stop": "ddd", "logprobs": 1},
     lambda r: (r.c["text"], r.i, r.u, r.c["logprobs"]["tokens"]) == ("", [], 3, [])),
    ({"allowed_token_ids": [D], "stop": ["ddx", "dddd"]},
     lambda r: (r.c["text"], r.i, r.u) == ("", [], 4)),
    ({"allowed_token_ids": [D], "stop": "dddx"}, lambda r: r.c["text"] == "d" * 8 and r.u == 8),
    ({"allowed_token_ids": [D], "stop": "dd", "include_stop_str_in_output": True, "logprobs": 0},
     lambda r: (r.c["text"], r.i, r.u) == ("dd", [D] * 2, 2)
     and r.c["logprobs"]["text_offset"] == [0, 1]),
    ({"allowed_token_ids": [D], "stop_token_ids": [D], "include_stop_str_in_output": True},
     lambda r: (r.c["text"], r.i, r.u) == ("d", [D], 1)),
    ({"allowed_token_ids": [EOS]}, lambda r: (r.c["text"], r.i, r.u) == ("", [], 1)),
    ({"allowed_token_ids": [EOS], "include_stop_str_in_output": True},
     lambda r: (r.c["text"], r.i) == ("", [EOS])),
    ({"allowed_token_ids": [EOS], "include_stop_str_in_output": True, "skip_special_tokens": False},
     lambda r: (r.c["text"], r.i) == ("<eos>", [EOS])),
    ({"allowed_token_ids": [EOS], "ignore_eos": True}, lambda r: (r.c["text"], r.u) == ("", 8)),
    ({"allowed_token_ids": [EOS], "ignore_eos": True, "skip_special_tokens": False, "logprobs": 0},
     lambda r: r.c["text"] == "<eos>" * 8
     and r.c["logprobs"]["text_offset"] == list(range(0, 40, 5))),
    ({"allowed_token_ids": [EOS], "ignore_eos": True, "skip_special_tokens": False, "stop": "s><"},
     lambda r: (r.c["text"], r.i, r.u) == ("<eo", [EOS], 2)),
    ({"allowed_token_ids": [EOS, D], "logit_bias": {str(EOS): 100}, "max_tokens": 1, "logprobs": 0,
      "min_tokens": 1}, lambda r: r.i == [D]),
    ({"prompt": ""},
     lambda r: r.c["prompt_token_ids"] == [EOS] and r.c["text"] == r.ask(prompt=[EOS])["text"]),
    ({"prompt": [[]]}, lambda r: r.c["prompt_token_ids"] == [EOS]),
    ({"prompt": [""], "echo": True, "logprobs": 0},
     lambda r: r.c["text"] == r.ask(prompt="")["text"] and r.c["logprobs"]["tokens"][0] == "<eos>"),
    ({"prompt": ["ab", ""]},
     lambda r: [c["prompt_token_ids"] for c in r.a["choices"]] == [[0, 1], [EOS]]),
    ({"prompt": "", "repetition_penalty": 2}, lambda r: r.a["usage"]["prompt_tokens"] == 1),
    ({"prompt": "abcd", "truncate_prompt_tokens": 2, "echo": True},
     lambda r: r.c["text"].startswith("cd") and r.a["usage"]["prompt_tokens"] == 2),
    ({"prompt": "abcd", "truncate_prompt_tokens": 3, "truncation_side": "right", "echo": True},
     lambda r: r.c["text"] == "abc" + r.ask(prompt="abc")["text"]),
    ({"prompt": "abc", "truncate_prompt_tokens": 9}, lambda r: r.a["choices"] == r.plain),
    ({"prompt": "a" * 500, "truncate_prompt_tokens": -1},
     lambda r: len(r.c["prompt_token_ids"]) == SERVE.capacity - 8),
    ({"prompt": [0, 1, 2, 3], "truncate_prompt_tokens": 1},
     lambda r: r.c["prompt_token_ids"] == [3]),
    ({"prompt": "xé", "truncate_prompt_tokens": 1, "echo": True, "logprobs": 0},
     lambda r: r.c["text"][0] == "é" and r.c["logprobs"]["text_offset"][0] == 0),
    ({"prompt_logprobs": 2},
     lambda r: [p and len(p) in (2, 3) for p in r.c["prompt_logprobs"]] == [None, True, True]
     and r.c["logprobs"] is None),
    ({"prompt_logprobs": 0},
     lambda r: [list(p) for p in r.c["prompt_logprobs"][1:]] == [["1"], ["2"]]),
    ({"prompt_logprobs": 3, "logprobs": 1},
     lambda r: all(len(t) in (1, 2) for t in r.c["logprobs"]["top_logprobs"])
     and all(len(p) in (3, 4) for p in r.c["prompt_logprobs"][1:])),
    ({"prompt_logprobs": 1, "echo": True, "logprobs": 4},
     lambda r: r.c["prompt_logprobs"][1]["1"]["logprob"] == r.c["logprobs"]["token_logprobs"][1]
     and len(r.c["logprobs"]["top_logprobs"][1]) in (4, 5)),
    ({"prompt_logprobs": 1, "echo": True, "max_tokens": 0},
     lambda r: r.u == 0 and r.c["text"] == "abc"),
    ({"prompt_logprobs": 5, "prompt": "a"}, lambda r: r.c["prompt_logprobs"] == [None]),
    ({"return_tokens_as_token_ids": True, "logprobs": 1},
     lambda r: r.c["logprobs"]["tokens"] == [f"token_id:{i}" for i in r.i]),
    ({"request_id": "me-1.a:b"}, lambda r: r.a["id"] == "cmpl-me-1.a:b"),
    ({"n": 3, **ONLY, "presence_penalty": 1},
     lambda r: len({c["text"] for c in r.a["choices"]}) == 1),
    ({"prompt": ["a", "b"], "n": 2, "bad_words": "e"},
     lambda r: all("e" not in c["text"] for c in r.a["choices"])),
    ({"temperature": 2, "logit_bias": {str(i): -100 for i in range(VOCAB - 1)}, "ignore_eos": True},
     lambda r: r.i == [EOS] * 8),
    *(({name: value}, lambda r: r.a["choices"] == r.plain) for name, value in {
        "user": "me", "safety_identifier": "x", "session_id": "s", "service_tier": "flex",
        "prompt_cache_key": "k", "prompt_cache_retention": "24h", "store": False,
        "add_special_tokens": False, "spaces_between_special_tokens": False,
        "metadata": {"a": [1]}}.items()),
    *(({name: value[0]}, lambda r: r.a["choices"] == r.plain)
      for name, value in UNSUPPORTED.items() if value),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "holds"), SERVED)
def test_a_served_field(server, fields, holds):
    sent = {name: value for name, value in {**BASE, **fields}.items() if value is not None}
    answer = beside_a_neighbour(server, lambda: server.complete(**sent))
    assert answer.status == 200, answer.error
    choice = answer.json["choices"][0]
    found = SimpleNamespace(
        a=answer.json,
        c=choice,
        i=choice["token_ids"],
        u=answer.json["usage"]["completion_tokens"],
        plain=server.plain,
        ask=lambda **other: server.complete(**{**BASE, **other}).json["choices"][0],
    )
    assert holds(found), answer.json


@pytest.mark.parametrize(
    "fields",
    [
        {**ONLY, "stop": "ddd"},
        {"stop": ["ab", "b", "\u20ac"], "max_tokens": 30, "logprobs": 2},
        {"stop": "e", "include_stop_str_in_output": True, "max_tokens": 30, "logprobs": 0},
        {"skip_special_tokens": False, "ignore_eos": True, "max_tokens": 40, "temperature": 1.5},
        {"presence_penalty": 1.0, "min_p": 0.01, "max_tokens": 20, "logprobs": 1},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ],
)
def test_a_stream_is_the_same_in_parts(server, fields):
    sent = {k: v for k, v in fields.items() if k != "stream_options"}
    whole = server.complete(**{**BASE, **sent})
    answer = beside_a_neighbour(server, lambda: server.complete(**{**BASE, **fields}, stream=True))
    events, wanted = answer.events, whole.json["choices"][0]
    if "stream_options" in fields:
        counts = [event["usage"]["completion_tokens"] for event in events]
        assert counts == sorted(counts) and counts[-1] == whole.json["usage"]["completion_tokens"]
    parts = [event["choices"][0] for event in events if event["choices"]]
    assert "".join(part["text"] for part in parts) == wanted["text"]
    assert [i for part in parts for i in part["token_ids"]] == wanted["token_ids"]
    assert [part["prompt_token_ids"] for part in parts if "prompt_token_ids" in part] == [[0, 1, 2]]
    assert parts[-1]["finish_reason"] == wanted["finish_reason"]
    for key, values in (wanted["logprobs"] or {}).items():
        assert [v for part in parts for v in part["logprobs"][key]] == values


BODIES = {
    "a field twice": b'{"model": "unnamed", "prompt": "a", "max_tokens": 1, "max_tokens": 2}',
    "a field twice inside": b'{"model": "unnamed", "prompt": "a", "logit_bias": {"3": 1, "3": 2}}',
    "the same twice": b'{"prompt": "a", "prompt": "a"}',
    "a hundred thousand": b'{"prompt": "a"' + b', "prompt": "a"' * 50_000 + b"}",
}


@pytest.mark.parametrize("name", BODIES)
def test_a_field_that_is_given_twice(server, name):
    """JSON's last one would win: the other would be ignored."""
    send = beside_a_neighbour(server, lambda: server.send("POST", "/v1/completions", BODIES[name]))
    assert send.status == 400 and "is given more than once" in send.error["message"]


OTHER = [  # route, body, status, words or the answer
    ("/tokenize", {"prompt": "ab é"}, 200, [0, 1, 26, 53, 54]),
    ("/tokenize", {"prompt": ""}, 200, []),
    ("/tokenize", {"prompt": "<eos>", "model": NAME}, 200, tokenizer().encode("<eos>").ids),
    ("/tokenize", {"prompt": "a", "add_special_tokens": True}, 200, [0]),
    ("/tokenize", {"prompt": "a" * 5000}, 200, [0] * 5000),
    ("/tokenize", {}, 400, "prompt = null: must be a text"),
    ("/tokenize", {"prompt": ["a"]}, 400, "must be a text"),
    ("/tokenize", {"prompt": [1]}, 400, "must be a text"),
    ("/tokenize", {"prompt": "\ud800"}, 400, "surrogate"),
    ("/tokenize", {"prompt": "a", "model": "other"}, 404, "must be 'unnamed'"),
    ("/tokenize", {"prompt": "a", "model": 3}, 400, "model = 3"),
    ("/tokenize", {"text": "a"}, 400, "did you mean prompt?"),
    ("/tokenize", {"messages": []}, 400, "is no known field"),
    ("/tokenize", {"prompt": "a", "return_token_strs": 1}, 400, "true or false"),
    ("/tokenize", [], 400, "must be a JSON object"),
    ("/detokenize", {"tokens": [0, 1, 26, 53, 54]}, 200, "ab é"),
    ("/detokenize", {"tokens": []}, 200, ""),
    ("/detokenize", {"tokens": [EOS]}, 200, "<eos>"),
    ("/detokenize", {"tokens": [53]}, 200, "\N{REPLACEMENT CHARACTER}"),
    ("/detokenize", {"tokens": [VOCAB]}, 400, f"token id {VOCAB}: must be an id of the tokenizer"),
    ("/detokenize", {"tokens": [-1]}, 400, "a list of token ids"),
    ("/detokenize", {"tokens": [True]}, 400, "a list of token ids"),
    ("/detokenize", {"tokens": "ab"}, 400, "a list of token ids"),
    ("/detokenize", {"token": [1]}, 400, "did you mean tokens?"),
    ("/detokenize", {"tokens": [1], "prompt": "a"}, 400, "is no known field"),
    ("/detokenize", {"tokens": [[1]]}, 400, "a list of token ids"),
]


@pytest.mark.parametrize(("path", "body", "status", "wanted"), OTHER)
def test_other_routes(server, path, body, status, wanted):
    sent = json.dumps(body)
    answer = beside_a_neighbour(server, lambda: server.send("POST", path, sent))
    assert answer.status == status
    if status != 200:
        assert wanted in answer.error["message"]
    elif path == "/tokenize":
        found = {"count": len(wanted), "max_model_len": SERVE.capacity, "tokens": wanted}
        assert answer.json == {**found, "token_strs": None}
    else:
        assert answer.json == {"prompt": wanted}
