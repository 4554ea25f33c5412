"""Text, pieces and offsets of an answer agree, whatever the tokenizer and the tokens."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from engram_jax.addressing import tokenizer_size
from engram_jax.addressing.detokenizer import BROKEN, bytes_of
from engram_jax.serve.http.completion_request import parse_request
from engram_jax.serve.http.completion_response import Answer
from engram_jax.serve.http.json_fields import ApiError, Fields
from engram_jax.serve.request import Delta, Finish, Logprob
from engram_jax.serve.text_stream import TextStream, continuation
from tests.tokenizer_kinds import KINDS, SPECIAL, TEXT, kind

LOSSLESS = ("byte-level BPE",)
KINDS_OF_MODELS = list(KINDS)[:7]  # what language models have; the others decode rarely met ways


def deltas_of(tokenizer, prompt, ids, stop=()):
    """What the engine tells: a delta per token, and one at the end."""
    stream = TextStream(tokenizer, stop, prompt)
    given = tuple(Logprob(t, -1.0, {t: -1.0}) for t in prompt[1:])
    out = []
    for number, token in enumerate(ids):
        text, stopped = stream.push(token)
        listed = (Logprob(token, -1.0, {token: -1.0}),)
        out.append(Delta(0, (token,), text, listed, () if number else given))
        if stopped:
            break
    return [*out, Delta(0, text=stream.flush()[0], finish=Finish.LENGTH)]


def answers(tokenizer, prompt, ids, **fields):
    """(the choice as one object, the choice put together from events)."""
    asked = {"prompt": prompt, "max_tokens": len(ids), "logprobs": 0, **fields}
    request = parse_request(Fields(asked), tokenizer=tokenizer, capacity=10_000, most=1)
    deltas = deltas_of(tokenizer, request.prompts[0].ids, ids)
    whole = next(Answer(request, "m", tokenizer).whole([deltas])["choices"])
    streaming = Answer(request, "m", tokenizer).choices[0]
    chunks = [chunk for delta in deltas if (chunk := streaming.add(delta)) is not None]
    together = {key: [x for c in chunks for x in c["logprobs"][key]] for key in whole["logprobs"]}
    return whole, {"text": "".join(c["text"] for c in chunks), "logprobs": together}


def cases(tokenizer, count):
    """(prompt as a text or as ids, ids that are generated)."""
    rng, size = np.random.default_rng(0), tokenizer_size(tokenizer)
    words = [i for i in range(size) if bytes_of(tokenizer, i) is None]
    for number in range(count):
        length = int(rng.integers(1, 30))
        any_id, word = rng.integers(0, size, length), rng.choice(words, length)
        ids = np.where(rng.random(length) < 0.5, any_id, word).tolist()
        start = int(rng.integers(0, 150))
        text = TEXT[start : start + int(rng.integers(4, 40))]
        given = rng.integers(0, size, rng.integers(1, 9)).tolist()
        yield (given if number % 2 or not tokenizer.encode(text).ids else text), ids


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("name", KINDS_OF_MODELS)
def test_offsets_are_places_in_the_text(name, echo):
    tokenizer, checked = kind(name), 0
    special = {tokenizer.token_to_id(token) for token in SPECIAL}
    for prompt, ids in cases(tokenizer, 100):
        whole, streamed = answers(tokenizer, prompt, ids, echo=echo)
        text, listed = whole["text"], whole["logprobs"]
        assert streamed == {"text": text, "logprobs": listed}
        given = prompt if isinstance(prompt, str) else tokenizer.decode(prompt, False)
        assert text.startswith(given) or not echo
        offsets = listed["text_offset"]
        assert len(offsets) == len(listed["tokens"]) and offsets == sorted(offsets)
        assert offsets[-1] <= len(text)
        ends = [*offsets[1:], len(text)]
        parts = [text[a:b] for a, b in itertools.pairwise([0, *offsets[1:], len(text)])]
        assert "".join(parts) == text
        first = len(offsets) - len(ids)
        assert not echo or offsets[first] >= len(given)
        for n, (token, at, end) in enumerate(zip(listed["tokens"], offsets, ends, strict=True)):
            mine = n >= first
            if mine and ids[n - first] in special:
                assert at == end or BROKEN in text[at:end] or "fallback" in name
            elif token.startswith("bytes:") or BROKEN in token:
                continue
            elif mine or isinstance(prompt, list) or name in LOSSLESS:
                assert text[at : at + len(token)] == token
                checked += 1
    assert checked > 300


@pytest.mark.parametrize("name", KINDS_OF_MODELS)
def test_an_answer_is_what_decode_makes_of_its_tokens(name):
    """Behind a prompt, so what a tokenizer drops at a beginning only stays."""
    tokenizer = kind(name)
    word = tokenizer.encode("the").ids
    for _, ids in cases(tokenizer, 100):
        ids = [i for i in ids if bytes_of(tokenizer, i) is None]  # no row across the border
        whole = tokenizer.decode([*word, *ids])
        expected = whole.removeprefix(tokenizer.decode(word))
        assert continuation(tokenizer, word, ids) == expected
        if name != "WordPiece":  # its first token keeps the sign of a word's middle
            assert expected.lstrip() == tokenizer.decode(ids).lstrip()


def test_a_leading_space_is_not_lost():
    tokenizer = kind("Unigram, Metaspace")
    word = tokenizer.token_to_id("\u2581memory")
    whole, streamed = answers(tokenizer, "the", [word, word], echo=True)
    assert whole["text"] == streamed["text"] == "the memory memory"
    assert whole["logprobs"]["tokens"] == ["the", " memory", " memory"]
    assert whole["logprobs"]["text_offset"] == [0, 3, 10]
    assert answers(tokenizer, "the", [word])[0]["text"] == " memory"


def test_tokens_that_differ_by_a_space_are_two_entries():
    tokenizer = kind("Unigram, byte fallback")
    ids = [tokenizer.token_to_id(t) for t in ("e", "<0x65>", "\u2581the")]
    request = parse_request(
        Fields({"prompt": "e", "logprobs": 3, "max_tokens": 1}),
        tokenizer=tokenizer,
        capacity=9,
        most=1,
    )
    top = dict(zip(ids, (-1.0, -2.0, -3.0), strict=True))
    choice = Answer(request, "m", tokenizer).choices[0]
    made = choice.add(Delta(0, (ids[0],), "e", (Logprob(ids[0], -1.0, top),)))
    assert made["logprobs"]["top_logprobs"] == [{"e": -1.0, "bytes:\\x65": -2.0, " the": -3.0}]


def test_an_echoed_prompt_is_the_one_that_was_sent():
    """Its tokens stand where their text was before it was normalised."""
    tokenizer = kind("byte-level BPE behind NFKC")
    prompt = "\ufb01ne \u00bd of it"
    whole, _ = answers(tokenizer, prompt, tokenizer.encode(" too").ids, echo=True)
    assert whole["text"] == prompt + " too"
    tokens, offsets = whole["logprobs"]["tokens"], whole["logprobs"]["text_offset"]
    assert offsets[tokens.index(" of")] == prompt.index(" of")
    assert offsets[len(tokenizer.encode(prompt).ids)] == len(prompt)


def test_an_empty_prompt_is_what_stands_between_documents():
    """Where no end of sequence is known there is nothing to start from."""

    def parse(prompt, eos_id):
        fields = Fields({"prompt": prompt, "max_tokens": 1})
        how = {"tokenizer": kind("byte-level BPE"), "capacity": 9, "most": 4, "eos_id": eos_id}
        return parse_request(fields, **how).prompts

    assert parse(["", "a"], 7)[0].ids == (7,)
    assert parse([[]], 7) == parse("", 7)
    for eos_id in (None, -1):
        for prompt in ("", [[]], ["a", ""]):
            with pytest.raises(ApiError, match="prompt: is empty; must have at least one token"):
                parse(prompt, eos_id)
