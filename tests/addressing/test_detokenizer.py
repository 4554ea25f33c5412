"""Tokens one after the other give what the library's own `decode` gives of all of them."""

from __future__ import annotations

import time

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from engram_jax.addressing import tokenizer_size
from engram_jax.addressing.detokenizer import BROKEN, Detokenizer, bytes_of, text_of
from tests.tokenizer_kinds import KINDS, SPECIAL, TEXT, kind


def told(tokenizer, ids, skip_special_tokens=True):
    """(text, where each token begins in it)."""
    one, text, places = Detokenizer(tokenizer), "", []
    for token in ids:
        before, own = one.push(token, skip_special_tokens)
        places.append(len(text) + len(before))
        text += before + own
        assert one.length == len(text)
    return text + one.flush(), places


def sequences(tokenizer, count=250):
    """Random ids: any, unknown ones among them; few different ones; mostly parts of characters."""
    rng, size = np.random.default_rng(0), tokenizer_size(tokenizer)
    parts = [i for i in range(size) if bytes_of(tokenizer, i) is not None] or [0]
    for number in range(count):
        length = int(rng.integers(1, 40))
        few = rng.integers(0, size, 3)
        any_id = rng.integers(0, size + 2, length)
        some = rng.choice(parts if number % 3 == 2 else few, length)
        yield np.where(rng.random(length) < (1, 0.2, 0.2)[number % 3], any_id, some).tolist()


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_random_tokens_become_what_decode_makes_of_them(name, skip):
    tokenizer = kind(name)
    for ids in sequences(tokenizer):
        if "Strip" in name:  # the library fails where less is left than it strips
            ids = [*ids, *map(tokenizer.token_to_id, "cc"), *ids]
        text, places = told(tokenizer, ids, skip)
        assert text == tokenizer.decode(ids, skip_special_tokens=skip), ids
        assert places == sorted(places) and places[-1] <= len(text)


@pytest.mark.parametrize("name", list(KINDS)[:6])
def test_real_text_becomes_what_decode_makes_of_it(name):
    tokenizer, rng = kind(name), np.random.default_rng(1)
    for _ in range(200):
        start, length = rng.integers(0, 150), rng.integers(1, 30)
        ids = tokenizer.encode(TEXT[start : start + length]).ids
        assert told(tokenizer, ids)[0] == tokenizer.decode(ids)


@pytest.mark.parametrize("name", KINDS)
def test_a_token_stands_where_it_is_said_to_begin(name):
    """Its own text, where it is one by itself."""
    tokenizer, checked = kind(name), 0
    for ids in sequences(tokenizer, 200):
        text, places = told(tokenizer, ids, skip_special_tokens=False)
        one = Detokenizer(tokenizer)
        for token, at in zip(ids, places, strict=True):
            own = text_of(tokenizer, token, one.inside)
            one.push(token, skip_special_tokens=False)
            if bytes_of(tokenizer, token) is None and BROKEN not in own:
                checked += 1
                assert name in UNSETTLED or text[at : at + len(own)] == own, (ids, token)
    assert checked > 100


# Their tokens' text depends on what follows, or on the same token before.
UNSETTLED = ("BPEDecoder", "CTC", "Fuse, Strip both ends", "Fuse, Replace")


@pytest.mark.parametrize("name", list(KINDS)[3:7])
def test_the_places_are_exact(name):
    """Against `decode` of every beginning, where that is a beginning of the whole."""
    tokenizer = kind(name)
    for ids in sequences(tokenizer, 60):
        text, places = told(tokenizer, ids)
        for n, at in enumerate(places):
            begun, more = tokenizer.decode(ids[:n]), tokenizer.decode(ids[: n + 1])
            if more.startswith(begun) and more != begun and text.startswith(more):
                in_a_row = bytes_of(tokenizer, ids[n]) is not None
                assert at <= len(begun) if in_a_row else at == len(begun)


@pytest.mark.parametrize("name", list(KINDS)[:3])
def test_the_places_are_exact_among_broken_characters(name):
    """Against the bytes: a token begins at the character that its first byte belongs to."""
    tokenizer, special = kind(name), {kind(name).token_to_id(t) for t in SPECIAL}
    to_pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    starts = [0x800, *range(0x1000, 0x10000, 0x1000), *range(0x10000, 0x110000, 0x10000)]
    byte_of = {
        piece: byte
        for c in map(chr, [*range(0x800), *(i for i in starts if i >> 11 != 0x1B)])
        for piece, byte in zip(to_pieces(c)[0][0], c.encode(), strict=True)
    }
    for ids in sequences(tokenizer, 200):
        known = [i for i in ids if set(tokenizer.id_to_token(i) or "\0") <= set(byte_of)]
        known = [i for i in known if i not in special]
        data = b""
        for token, at in zip(known, told(tokenizer, known)[1], strict=True):
            own = bytes(byte_of[c] for c in tokenizer.id_to_token(token))
            assert at == len((data + own[:1]).decode(errors="replace")) - 1
            data += own


def test_a_space_at_the_beginning_is_kept_as_decode_keeps_it():
    for name in ("Unigram, Metaspace", "Unigram, byte fallback"):
        tokenizer = kind(name)
        space, word = (tokenizer.token_to_id(p) for p in ("\u2581", "\u2581the"))
        assert told(tokenizer, [space, word])[0] == " the"
        assert told(tokenizer, [word, word])[0] == "the the"
        assert text_of(tokenizer, word) == " the" and text_of(tokenizer, word, False) == "the"


def test_a_row_of_bytes_that_a_later_byte_breaks_is_not_told_before():
    tokenizer = kind("Unigram, byte fallback")
    one = Detokenizer(tokenizer)
    a, part, word = (tokenizer.token_to_id(t) for t in ("<0x41>", "<0xE2>", "e"))
    assert [one.push(t) for t in (a, part)] == [("", "")] * 2
    assert one.push(word) == (BROKEN * 2, "e")
    assert bytes_of(tokenizer, a) == b"A" and bytes_of(tokenizer, word) is None


def test_parts_of_a_character_begin_where_it_begins():
    tokenizer = kind("byte-level BPE")
    ids = [
        tokenizer.token_to_id(c) for c in "\u00e2\u0124\u00acx\u00c3x\u00c3"
    ]  # e2 82 ac x c3 x c3
    assert told(tokenizer, ids) == ("\u20acx\ufffdx\ufffd", [0, 0, 0, 1, 2, 3, 4])
    assert [bytes_of(tokenizer, i) for i in ids[:4]] == [b"\xe2", b"\x82", b"\xac", None]


@pytest.mark.parametrize("name", KINDS)
def test_time_does_not_grow_with_what_is_held(name):
    """About 0.1 s; decoding all that is held at every token would take a minute."""
    tokenizer = kind(name)
    worst = next((i for i in range(300) if bytes_of(tokenizer, i)), 0)
    began = time.perf_counter()
    told(tokenizer, [worst] * 20_000)
    assert time.perf_counter() - began < 5
